"""Words of the report that a reader may not know who has trained other networks; each entry builds on earlier ones."""

from __future__ import annotations

GLOSSARY = {
    "Diffusion transformer (DiT)": "A transformer that learns to remove noise from pictures. Applied step by step to pure "
    "noise, it makes a picture.",
    "Latents": "What the network sees: each picture, made smaller by an autoencoder. Decoding a latent gives the picture back.",
    "Timestep": "How much noise is in the input: 0 is almost clean, the last is pure noise.",
    "Validation error": "Mean squared error of the network's prediction on pictures that it was not trained on, with the same "
    "noise for every run. Lower is better. It says how well noise is predicted, not how good generated pictures look.",
    "EMA weights": "An exponential moving average of the weights over training. Samples are usually drawn with these, so runs "
    'are judged by them. "Trained weights" means the weights without averaging.',
    "Head": "The last linear layer, final_layer.linear in the published code. It turns the last features into the prediction.",
    "adaLN": "Adaptive layer normalisation. A small layer in each block reads timestep and class, and decides how far "
    "features are shifted and scaled.",
    "Gate": "A factor that adaLN computes, too. It multiplies what attention or MLP adds to the features. While all gates of a "
    "block are zero, the block passes its input on unchanged.",
    "adaLN-Zero": "The published start, here called adaln_zero. All adaLN layers, gates included, and the head are zero, so "
    "the untrained network predicts zero.",
    "Seed": "A number that determines all random draws of a run. Runs with the same seed see the same batches and noise, so "
    "strategies are compared seed by seed; n is the number of seeds in a comparison.",
    "95 % interval": "The range of differences that agree with what these seeds show. If zero lies in it, the difference "
    "cannot be told from chance.",
    "Declared, exploratory": "Declared comparisons were chosen before the runs, and their verdicts are corrected together for "
    "their number. All others are exploratory and not corrected, so some of them may be due to chance.",
    "Fréchet distance": "How far generated pictures are from real ones in the features of another network, as in FID. Lower is "
    "better. It needs many samples.",
}
