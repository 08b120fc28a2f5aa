"""The one place that imports matplotlib, at the moment of drawing."""


def require_pyplot(caller):
    """Return `matplotlib.pyplot`, or raise an ImportError that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{caller} requires matplotlib: pip install 'hqsearch[plot]'") from error
    return plt
