"""Where patches are taken: randomness, patch, samplers, grid_sampler, centre_maps, centre_draws."""
