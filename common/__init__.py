"""What two scripts must agree on: options, pictures, checkpoints, plots, and the drawn demo data."""
