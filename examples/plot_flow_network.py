"""Draw the flow network of one level: classes, parent groups and buckets in columns, flow as line width.

The best codes of a mini-batch are a minimum-cost flow. Here six classes in three parent groups share four
buckets. Two units leave the source for each class, the classes of one group pay for meeting in a bucket, and
every bucket pays for being crowded. Grey lines are choices that a class has, coloured lines carry flow.
Run with `python examples/plot_flow_network.py`; writes `flow_network.png`.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import networkx
import numpy as np

from hqsearch.assignment import level_network, solve_level

rng = np.random.default_rng(3)
scores = rng.random((6, 4))
parents = [0, 0, 0, 1, 1, 2]
options = {"sparsity": 2, "sibling_penalty": 1.0, "orthogonality_penalty": 0.2}

network = level_network(scores, parents, **options)
graph = network.to_networkx()
cost, flows = networkx.network_simplex(graph)

# %%
# The network simplex of networkx finds the same energy as the compiled solver, in the same integers.
codes = solve_level(scores, parents, **options)
print(f"energy by networkx {cost}, by solve_level {network.energy(codes)}")

# %%
# Parallel unit arcs run through nodes of their own, the slots. For the picture they are one line a bucket.
columns = {"source": 0.0, "class": 1.0, "group_bucket": 2.0, "bucket": 3.0, "sink": 4.0}
colours = ["tab:blue", "tab:orange", "tab:green"]
members = {role: [v for v, r in graph.nodes(data="role") if r == role] for role in columns}
lowest = {"group_bucket": 0.14}  # so that a line from a class without siblings passes below its column
position = {
    v: (x, 0.5 if len(members[role]) == 1 else 1 - (1 - lowest.get(role, 0)) * i / (len(members[role]) - 1))
    for role, x in columns.items()
    for i, v in enumerate(members[role])
}
lines: dict[tuple[int, int], int] = {}
for tail, targets in flows.items():
    for head, flow in targets.items():
        if head in position and tail in position:
            lines[tail, head] = flow
        elif head not in position:  # tail -> slot -> next column
            (beyond,) = graph.successors(head)
            lines[tail, beyond] = lines.get((tail, beyond), 0) + flow


def group_of(tail, head):
    """Return the parent group that an arc belongs to, or None."""
    return graph.nodes[tail].get("group", graph.nodes[head].get("group"))


figure, ax = plt.subplots(figsize=(10, 6), layout="constrained")
for (tail, head), flow in sorted(lines.items(), key=lambda line: line[1]):
    (x0, y0), (x1, y1) = position[tail], position[head]
    group = group_of(tail, head)
    colour = "0.85" if flow == 0 else "0.35" if group is None else colours[group]
    ax.plot(
        [x0, x1], [y0, y1], color=colour, linewidth=0.7 if flow == 0 else 1.8 * flow, zorder=1 + (flow > 0)
    )
for role, nodes in members.items():
    for v in nodes:
        facts = graph.nodes[v]
        colour = colours[facts["group"]] if "group" in facts else "0.35"
        ax.scatter(*position[v], s=420, color=colour, zorder=3)
        label = {
            "class": f"c{facts.get('class_')}",
            "group_bucket": f"{facts.get('group')},{facts.get('bucket')}",
            "bucket": f"b{facts.get('bucket')}",
        }.get(role, "")
        ax.annotate(label, position[v], ha="center", va="center", color="white", fontsize=9, zorder=4)
titles = {
    "source": "source",
    "class": "classes",
    "group_bucket": "buckets of each\nparent group",
    "bucket": "buckets",
    "sink": "sink",
}
for role, x in columns.items():
    ax.annotate(titles[role], (x, 1.07), ha="center", va="bottom", annotation_clip=False)
ax.set(xlim=(-0.3, 4.3), ylim=(-0.07, 1.2))
ax.set_axis_off()
figure.savefig("flow_network.png", dpi=130)
