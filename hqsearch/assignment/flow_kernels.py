# ruff: noqa: D103, D400, D401, D403
"""Compiled shortest paths for the flow problem of one level."""

import numpy as np
from numba import njit

from hqsearch.assignment.integer_costs import STATUS_OPTIMAL, STATUS_STUCK

INF = np.int64(2**62)
HELD = np.int64(2**61)
REACHABLE = np.int64(2**60)
LIMIT = np.int64(2**58)


@njit(cache=True, nogil=True)
def smallest(row, k1, picks, vals):
    """indices of k1 smallest of row (destroyed), ascending; vals"""
    d = row.shape[0]
    nb = (d + 31) // 32
    bm = np.empty(nb, np.int64)
    for b in range(nb):
        lo = b * 32
        hi = min(d, lo + 32)
        m = INF
        for t in range(lo, hi):
            m = min(m, row[t])
        bm[b] = m
    for j in range(k1):
        m = bm[0]
        bi = 0
        for b in range(1, nb):
            if bm[b] < m:
                m = bm[b]
                bi = b
        lo = bi * 32
        hi = min(d, lo + 32)
        ti = lo
        for t in range(lo, hi):
            if row[t] == m:
                ti = t
                break
        picks[j] = ti
        vals[j] = m
        row[ti] = INF
        m = INF
        for t in range(lo, hi):
            m = min(m, row[t])
        bm[bi] = m


@njit(cache=True, nogil=True)
def take(c, t, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m):
    """class c takes bucket t"""
    j = nh[c]
    hold[c, j] = t
    hpos[c, j] = m[t]
    lst[t, m[t]] = c
    m[t] += 1
    nh[c] = j + 1
    if P > 0:
        gg = g[c]
        if gptr[gg + 1] - gptr[gg] > 1:
            mg[gg, t] += 1
            for i in range(gptr[gg], gptr[gg + 1]):
                r = gmem[i]
                if W[r, t] != HELD:
                    W[r, t] += P
    W[c, t] = HELD


@njit(cache=True, nogil=True)
def drop(c, t, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m):
    j = 0
    while hold[c, j] != t:
        j += 1
    i = hpos[c, j]
    last = nh[c] - 1
    hold[c, j] = hold[c, last]
    hpos[c, j] = hpos[c, last]
    nh[c] = last
    e = m[t] - 1
    if i != e:
        r = lst[t, e]
        lst[t, i] = r
        jj = 0
        while hold[r, jj] != t:
            jj += 1
        hpos[r, jj] = i
    m[t] = e
    W[c, t] = C[c, t]
    if P > 0:
        gg = g[c]
        if gptr[gg + 1] - gptr[gg] > 1:
            mg[gg, t] -= 1
            W[c, t] += P * (mg[gg, t] + 1)  # the loop below takes one P off again
            for q in range(gptr[gg], gptr[gg + 1]):
                r = gmem[q]
                if W[r, t] != HELD:
                    W[r, t] -= P


@njit(cache=True, nogil=True)
def place(c, k, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m, p, alpha, row, picks, vals):
    """initial placement fast path; True if done"""
    d = C.shape[1]
    for t in range(d):
        row[t] = W[c, t] + p[t]
    k1 = min(k + 1, d)
    smallest(row, k1, picks, vals)
    up = vals[k] if k < d else LIMIT
    if P > 0:
        gg = g[c]
        for i in range(gptr[gg], gptr[gg + 1]):
            r = gmem[i]
            if r == c:
                continue
            for j in range(nh[r]):
                t = hold[r, j]
                up = min(up, C[c, t] - C[r, t] + alpha[r])
        if up < vals[k - 1]:
            return False
    alpha[c] = up
    for j in range(k):
        take(c, picks[j], C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
    return True


@njit(cache=True, nogil=True)
def insert(c0, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m, p, alpha, lab, openlab, pred, via, best):
    """one more unit for class c0 at fixed bucket prices: shortest path inside its group"""
    d = C.shape[1]
    gg = g[c0]
    lo = gptr[gg]
    hi = gptr[gg + 1]
    # alpha of c0 must be feasible: it is (kept by caller)
    for i in range(lo, hi):
        lab[i - lo] = INF
        openlab[i - lo] = INF
        if gmem[i] == c0:
            lab[i - lo] = 0
            openlab[i - lo] = 0
            pred[i - lo] = -1
    endval = INF
    endc = -1
    endt = -1
    while True:
        bi = -1
        bv = endval
        for i in range(hi - lo):
            if openlab[i] < bv:
                bv = openlab[i]
                bi = i
        if bi < 0:
            break
        openlab[bi] = INF
        c = gmem[lo + bi]
        base = lab[bi] - alpha[c]
        mn = INF
        for t in range(d):
            mn = min(mn, W[c, t] + p[t])
        if base + mn < endval:
            for t in range(d):
                if W[c, t] + p[t] == mn:
                    endt = t
                    break
            endval = base + mn
            endc = bi
        for i in range(lo, hi):
            r = gmem[i]
            if i - lo == bi:
                continue
            for j in range(nh[r]):
                t = hold[r, j]
                if W[c, t] != HELD:
                    v = base + C[c, t] - C[r, t] + alpha[r]
                    if v < lab[i - lo]:
                        lab[i - lo] = v
                        openlab[i - lo] = v
                        pred[i - lo] = bi
                        via[i - lo] = t
    for i in range(hi - lo):
        if lab[i] < endval:
            alpha[gmem[lo + i]] += endval - lab[i]
    i = endc
    t = endt
    while True:
        c = gmem[lo + i]
        if pred[i] >= 0:
            b = via[i]
            drop(c, b, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            take(c, t, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            t = b
            i = pred[i]
        else:
            take(c, t, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            break


@njit(cache=True, nogil=True)
def demand(C, k, p, row, picks, vals, cnt):
    n, d = C.shape
    cnt[:] = 0
    k1 = min(k + 1, d)
    gap = 0
    for c in range(n):
        for t in range(d):
            row[t] = C[c, t] + p[t]
        smallest(row, k1, picks, vals)
        for j in range(k):
            cnt[picks[j]] += 1
        gap += vals[k1 - 1] - vals[k - 1]
    return gap / n


@njit(cache=True, nogil=True)
def branch_is_free(u, root, branch, used, left, targets, found, P, g, gptr, mg, d):
    """Whether a unit may leave root[u] along the branch of u, besides those accepted."""
    b = branch[u]
    s = root[u]
    if used[b] or left[s] == 0:
        return False
    if P > 0 and s < d and b > d:
        q = g[b - d - 1]
        if mg[q, s] > 1:
            for f in range(found):
                v = targets[f]
                if root[v] == s and branch[v] > d and g[branch[v] - d - 1] == q:
                    return False
    return True


@njit(cache=True, nogil=True)
def forest(
    C,
    W,
    P,
    w,
    g,
    gptr,
    gmem,
    mg,
    hold,
    nh,
    hpos,
    lst,
    m,
    p,
    ps,
    alpha,
    x,
    eb,
    es,
    lab,
    key,
    pred,
    via,
    root,
    branch,
    used,
    left,
    targets,
    patience,
    stats,
):
    """grow; returns n_targets, radius"""
    n, d = C.shape
    N = d + 1 + n
    for v in range(N):
        lab[v] = INF
        key[v] = INF
    nsrc = 0
    ntgt = 0
    for t in range(d):
        left[t] = 0
        if eb[t] > 0:
            lab[t] = 0
            key[t] = 0
            pred[t] = -1
            left[t] = eb[t]
            nsrc += eb[t]
        elif eb[t] < 0:
            ntgt += 1
    left[d] = 0
    if es > 0:
        lab[d] = 0
        key[d] = 0
        pred[d] = -1
        left[d] = es
        nsrc += es
    elif es < 0:
        ntgt += 1
    for v in range(N):
        used[v] = 0
    found = 0
    radius = np.int64(0)
    idle = 0
    while True:
        bv = INF
        for v in range(N):
            bv = min(bv, key[v])
        if bv >= REACHABLE:
            break
        if found > 0 and bv > radius and idle > patience:
            break
        u = 0
        while key[u] != bv:
            u += 1
        key[u] = INF
        radius = bv
        idle += 1
        stats[1] += 1
        pu = pred[u]
        if pu < 0:
            root[u] = u
            branch[u] = u
        else:
            root[u] = root[pu]
            branch[u] = u if pred[pu] < 0 else branch[pu]
        if u < d:
            if eb[u] < 0:
                ntgt -= 1
                if branch_is_free(u, root, branch, used, left, targets, found, P, g, gptr, mg, d):
                    used[branch[u]] = 1
                    left[root[u]] -= 1
                    targets[found] = u
                    found += 1
                    nsrc -= 1
                    idle = 0
            if nsrc == 0 or ntgt == 0:
                break
            # scan bucket
            v = bv + w * x[u] - p[u] + ps
            if v < lab[d]:
                lab[d] = v
                key[d] = v
                pred[d] = u
            base = bv - p[u]
            for i in range(m[u]):
                r = lst[u, i]
                h = C[r, u]
                if P > 0 and gptr[g[r] + 1] - gptr[g[r]] > 1:
                    h += P * (mg[g[r], u] - 1)
                v = base + alpha[r] - h
                if v < lab[d + 1 + r]:
                    lab[d + 1 + r] = v
                    key[d + 1 + r] = v
                    pred[d + 1 + r] = u
        elif u == d:
            if es < 0:
                ntgt -= 1
                if branch_is_free(u, root, branch, used, left, targets, found, P, g, gptr, mg, d):
                    used[branch[u]] = 1
                    left[root[u]] -= 1
                    targets[found] = u
                    found += 1
                    nsrc -= 1
                    idle = 0
            if nsrc == 0 or ntgt == 0:
                break
            for t in range(d):
                if x[t] > 0:
                    v = bv - w * (x[t] - 1) + p[t] - ps
                    if v < lab[t]:
                        lab[t] = v
                        key[t] = v
                        pred[t] = d
        else:
            c = u - d - 1
            base = bv - alpha[c]
            Wc = W[c]
            mn = INF
            for t in range(d):
                mn = min(mn, Wc[t] + p[t])
            sm = INF
            if P > 0:
                gg = g[c]
                for i in range(gptr[gg], gptr[gg + 1]):
                    r = gmem[i]
                    if r != c:
                        for j in range(nh[r]):
                            t = hold[r, j]
                            if Wc[t] != HELD:
                                a = C[c, t] - C[r, t] + alpha[r]
                                sm = min(sm, a)
                                v = base + a
                                if v < lab[d + 1 + r]:
                                    lab[d + 1 + r] = v
                                    key[d + 1 + r] = v
                                    pred[d + 1 + r] = u
                                    via[r] = t
            mn2 = min(mn, sm)
            if mn2 > alpha[c]:
                lab[u] += mn2 - alpha[c]
                alpha[c] = mn2
            if base + mn < INF:
                stats[2] += 1
                for t in range(d):
                    v = base + Wc[t] + p[t]
                    better = v < lab[t]
                    lab[t] = v if better else lab[t]
                    key[t] = v if better else key[t]
                    pred[t] = u if better else pred[t]
    # prices
    for t in range(d):
        if lab[t] < radius:
            p[t] += radius - lab[t]
    if lab[d] < radius:
        ps += radius - lab[d]
    for c in range(n):
        if lab[d + 1 + c] < radius:
            alpha[c] += radius - lab[d + 1 + c]
    for f in range(found):
        v = targets[f]
        if v == d:
            es += 1
        else:
            eb[v] += 1
        while pred[v] >= 0:
            u = pred[v]
            if v == d:
                x[u] += 1
            elif u == d:
                x[v] -= 1
            elif v < d:  # class u takes bucket v
                take(u - d - 1, v, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            elif u < d:  # class v drops bucket u
                drop(v - d - 1, u, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            else:  # class u takes what its sibling v drops
                b = via[v - d - 1]
                drop(v - d - 1, b, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
                take(u - d - 1, b, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m)
            v = u
        if v == d:
            es -= 1
        else:
            eb[v] -= 1
    return found, ps, es


@njit(cache=True, nogil=True)
def solve_costs(C, k, P, w, g, gptr, gmem):
    newton = 0
    patience = 100
    stats = np.zeros(8, np.int64)
    n, d = C.shape
    G = gptr.shape[0] - 1
    if G == 1:
        w = w + P
        P = 0
    W = C.copy()
    p = np.zeros(d, np.int64)
    alpha = np.zeros(n, np.int64)
    hold = np.empty((n, k + 1), np.int32)
    hpos = np.empty((n, k + 1), np.int32)
    nh = np.zeros(n, np.int64)
    lst = np.empty((d, n), np.int32)
    m = np.zeros(d, np.int64)
    mg = np.zeros((G if P > 0 else 1, d), np.int64)
    row = np.empty(d, np.int64)
    picks = np.empty(k + 1, np.int64)
    vals = np.empty(k + 1, np.int64)
    big = 1
    if P > 0:
        for q in range(G):
            big = max(big, gptr[q + 1] - gptr[q])
    glab = np.empty(big, np.int64)
    gopen = np.empty(big, np.int64)
    gpred = np.empty(big, np.int64)
    gvia = np.empty(big, np.int64)
    q = n * k // d
    if w > 0 and newton > 0:
        bestp = p.copy()
        bestimb = np.inf
        for it in range(newton):
            gap = demand(C, k, p, row, picks, vals, m)
            slope = n / (d * max(gap, 1.0))
            # shift so that supply meets demand in total: avg
            mean = n * k / d
            imb = 0.0
            for t in range(d):
                x0 = (p[t]) / w + mean
                e = m[t] - x0
                imb += abs(e)
            if imb < bestimb:
                bestimb = imb
                bestp[:] = p
            for t in range(d):
                e = m[t] - (p[t] / w + mean)
                p[t] += np.int64(e / (slope + 1.0 / w))
        p[:] = bestp
        m[:] = 0
    for gi in range(G):
        for i in range(gptr[gi], gptr[gi + 1]):
            c = gmem[i]
            if not place(
                c, k, C, W, P, g, gptr, gmem, mg, hold, nh, hpos, lst, m, p, alpha, row, picks, vals
            ):
                mn = INF
                for t in range(d):
                    mn = min(mn, W[c, t] + p[t])
                for i2 in range(gptr[gi], gptr[gi + 1]):
                    r = gmem[i2]
                    if r != c:
                        for j in range(nh[r]):
                            t = hold[r, j]
                            mn = min(mn, C[c, t] - C[r, t] + alpha[r])
                alpha[c] = mn
                for j in range(k):
                    insert(
                        c,
                        C,
                        W,
                        P,
                        g,
                        gptr,
                        gmem,
                        mg,
                        hold,
                        nh,
                        hpos,
                        lst,
                        m,
                        p,
                        alpha,
                        glab,
                        gopen,
                        gpred,
                        gvia,
                        row,
                    )
    if w == 0:
        return hold, STATUS_OPTIMAL, stats
    # supply
    x = np.zeros(d, np.int64)
    ps = np.int64(0)
    # sink price by bisection: smallest ps with sum hi >= n k, where x in [ceil((p-ps)/w), floor((p-ps)/w)+1]
    lo = np.int64(0)
    hi = np.int64(0)
    pm = p[0]
    pM = p[0]
    for t in range(d):
        pm = min(pm, p[t])
        pM = max(pM, p[t])
    lo = pm - w * (n + 1)
    hi = pM + w
    need = n * k
    # total(ps) decreasing in ps ; find the largest ps with sum(max x) >= need
    while hi - lo > 1:
        mid = (lo + hi) // 2
        tot = 0
        for t in range(d):
            a = p[t] - mid
            if a >= 0:
                tot += a // w + 1
        if tot >= need:
            lo = mid
        else:
            hi = mid
    ps = lo
    tot = 0
    for t in range(d):
        a = p[t] - ps
        if a < 0:
            x[t] = 0
            # price below the sink's: bucket must hold nothing; allowed since w*0 - a >= 0
        else:
            f = a // w
            if f * w == a:
                # both f and f+1
                x[t] = f + 1
            else:
                x[t] = f + 1
        tot += x[t]
    # too many: lower where exact multiples, first where demand is short
    for ps_ in range(2):
        for t in range(d):
            if tot > need and x[t] > 0:
                a = p[t] - ps
                if a >= 0 and a == w * (x[t] - 1) and (ps_ == 1 or m[t] < x[t]):
                    x[t] -= 1
                    tot -= 1
    es = tot - need
    eb = np.empty(d, np.int64)
    todo = max(es, 0)
    for t in range(d):
        eb[t] = m[t] - x[t]
        todo += max(eb[t], 0)
    N = d + 1 + n
    lab = np.empty(N, np.int64)
    key = np.empty(N, np.int64)
    pred = np.empty(N, np.int64)
    via = np.empty(n, np.int64)
    root = np.empty(N, np.int64)
    branch = np.empty(N, np.int64)
    used = np.empty(N, np.int64)
    left = np.empty(d + 1, np.int64)
    targets = np.empty(d + 1, np.int64)
    stats[3] = todo
    while todo > 0:
        f, ps, es = forest(
            C,
            W,
            P,
            w,
            g,
            gptr,
            gmem,
            mg,
            hold,
            nh,
            hpos,
            lst,
            m,
            p,
            ps,
            alpha,
            x,
            eb,
            es,
            lab,
            key,
            pred,
            via,
            root,
            branch,
            used,
            left,
            targets,
            patience,
            stats,
        )
        if f == 0:
            return hold, STATUS_STUCK, stats
        todo -= f
        stats[0] += 1
    return hold, STATUS_OPTIMAL, stats
