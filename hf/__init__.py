"""Everything that knows Hugging Face's formats. `tokenizer` is its front door for text, `hf.weights` for models."""

import data


def tokenizer(name_or_folder):
    """The `data.Tokenizer` called "synth" or "gpt2", or that of a Hugging Face folder or repo id.

    Raises UserError where there is none.
    """
    if name_or_folder in data.TOKENIZERS:
        return data.TOKENIZERS[name_or_folder]()
    from hf import templates, weights  # jinja2 and tokenizers: only where a folder is opened

    return templates.load(weights.fetch(name_or_folder))
