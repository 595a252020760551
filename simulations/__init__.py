"""Virtual hospitals: phantoms, public data, partitions, engines, experiments and benchmarks."""
