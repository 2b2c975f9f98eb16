"""The report page of a run: one HTML file that needs nothing else, to be looked at before anyone trains on the data."""
