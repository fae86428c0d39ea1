"""Published ways to score, as data, and the one mechanism that scores a run under any of them."""
