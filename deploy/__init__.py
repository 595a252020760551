"""How the processes are started: environments, keys, service templates."""
