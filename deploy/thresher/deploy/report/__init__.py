"""``thresher report``: runs side by side, as one HTML file that needs no network."""
