"""A leaf table -> an index of the faiss library, for users who serve their searches from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hqsearch.search.table import LeafTable


def export_faiss(table: LeafTable) -> Any:
    """Answer `LeafTable.to_faiss`."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("LeafTable.to_faiss needs faiss: install hqsearch[faiss]") from error

    directory = table._directory
    n_lists = max(1, directory.cell_live.size)
    centroids = np.zeros((n_lists, table.embedding_dim), dtype=np.float32)
    quantizer = faiss.IndexFlatL2(table.embedding_dim)
    index = faiss.IndexIVFFlat(quantizer, table.embedding_dim, n_lists)
    lists: Any = index.invlists
    for first, segment in zip(directory.first_cell, directory.segments, strict=True):
        vectors, positions = segment.vectors(), segment.positions.astype(np.int64)
        live = table._live_flags[positions] != 0
        for cell in range(segment.n_cells):
            rows = np.arange(segment.cell_start[cell], segment.cell_start[cell + 1])
            rows = rows[live[rows]]
            if rows.size:
                entries = np.ascontiguousarray(vectors[rows])
                centroids[first + cell] = entries.mean(axis=0)
                lists.add_entries(
                    first + cell,
                    rows.size,
                    faiss.swig_ptr(positions[rows]),
                    faiss.swig_ptr(entries.view(np.uint8)),
                )
    quantizer.add(centroids)
    index.is_trained = True
    index.ntotal = table.n_live_items
    return index


def list_cells(
    table: LeafTable, level_scores, codes, n_neighbors: int, n_probes: int | None, probing: str
) -> np.ndarray:
    """Answer `LeafTable.cells_to_probe`."""
    from hqsearch.search.batches import plan_batch

    pair_query, pair_cell = plan_batch(table, level_scores, codes, n_neighbors, n_probes, probing)
    n_queries = len(codes)
    counts = np.bincount(pair_query, minlength=n_queries)
    lists = np.full((n_queries, max(1, counts.max(initial=0))), -1, dtype=np.int64)
    column = np.arange(pair_query.size) - np.repeat(np.cumsum(counts) - counts, counts)
    lists[pair_query, column] = pair_cell
    return lists
