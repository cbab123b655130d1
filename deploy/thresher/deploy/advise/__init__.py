"""``thresher advise``: what a step would take with each of our settings, and whether compressing pays here."""
