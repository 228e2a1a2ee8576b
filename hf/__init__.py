"""Everything that knows Hugging Face's formats. `tokenizer` is its front door for text, `hf.weights` for models."""


def tokenizer(name_or_folder):
    """The `data.Tokenizer` "synth" or "gpt2", or that of a Hugging Face folder or repo id. UserError: there is none."""
    import data  # in here, because `python -m hf.templates` starts in a tenth of a second without torch

    if name_or_folder in data.TOKENIZERS:
        return data.TOKENIZERS[name_or_folder]()
    from hf import templates, weights

    return templates.open_tokenizer(weights.fetch(name_or_folder, model=False))
