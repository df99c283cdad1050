"""Evaluation: feature spaces, distances between real and generated images in them, and pictures for the eye."""
