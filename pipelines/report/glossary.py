"""The words of the report that a reader who has trained another network may not know, in the order in which they build up."""

from __future__ import annotations

GLOSSARY = {
    "Diffusion transformer (DiT)": "A transformer that learns to remove noise from pictures. Applied step by step to pure "
    "noise, it makes a picture.",
    "Latents": "What the network sees: each picture, made smaller by an autoencoder. Decoding a latent gives the picture back.",
    "Timestep": "How much noise is in the input: 0 is almost clean, the last is pure noise.",
    "Validation error": "Mean squared error of the network's prediction on pictures that it was not trained on, with the same "
    "noise for every run. Lower is better. It says how well noise is predicted, not how good generated pictures look.",
    "EMA weights": "An exponential moving average of the weights over training. Samples are usually drawn with these, so runs "
    "are judged by them. The trained weights are those without averaging.",
    "Head": "The last linear layer, final_layer.linear in the published code. It turns the last features into the prediction.",
    "adaLN": "Adaptive layer normalisation. A small layer in each block reads timestep and class, and decides how far "
    "features are shifted and scaled.",
    "Gate": "A factor on what a block adds, also decided by timestep and class. While it is zero, the block passes its input "
    "on unchanged.",
    "adaLN-Zero": "The published start, here called adaln_zero. All adaLN layers, gates included, and the head are zero, so "
    "the untrained network predicts zero.",
    "Seed": "The number from which all chance in a run is drawn. Runs with the same seed see the same batches and noise, so "
    "strategies are compared seed by seed.",
    "95 % interval": "The range of differences that agree with what these seeds show. Where zero is in it, the difference "
    "cannot be told from chance.",
    "Fréchet distance": "How far generated pictures are from real ones in the features of another network, as in FID. Lower is "
    "better. It needs many samples.",
}
