"""Any place in a loop over data, for tests of what is told of it."""

from hypothesis import strategies as st

from thresher.protos.bookmark import Bookmark

counts = st.integers(0, 2**31)
shares = st.lists(st.tuples(st.integers(1, 2**31), counts), min_size=1, max_size=4).map(tuple)
bookmarks = st.builds(
    lambda first, more, passes, begun, dealt, *rest: Bookmark(first + more, passes, begun, first, dealt, *rest),
    counts, counts, counts, st.integers(1, 2**31), shares, counts, counts,
)  # fmt: skip
