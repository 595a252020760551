"""The site's worker: a process that stays, with data and device, and answers what the ClientApp hands over."""
