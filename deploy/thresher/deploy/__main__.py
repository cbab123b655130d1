"""``python -m thresher.deploy`` is ``thresher``."""

from thresher.deploy.cli import main

main()
