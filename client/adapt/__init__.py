"""From a trained theta and a few labelled scans to a model of a site's own, and to whether it may be used."""
