"""One short module for each DVC stage: read parameters, call `dit`, write outputs."""
