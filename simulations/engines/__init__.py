"""Ways to run the real ServerApp and ClientApp: in this process, or through Flower's simulation engine."""
