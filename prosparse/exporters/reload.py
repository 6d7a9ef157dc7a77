"""A fresh process that loads exported folders as their users will, without prosparse.

In: a JSON file that lists jobs {folder, trust_remote_code, dtype, threads, token_ids, text, logits}, as argument.
Out: each job's logits in its safetensors file, and what was loaded as JSON lines on stdout.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

with open(sys.argv[1]) as _file:
    _jobs = json.load(_file)
for _job in _jobs:
    torch.set_num_threads(_job["threads"])
    _trust = _job["trust_remote_code"]
    _loaded: Any = AutoModelForCausalLM.from_pretrained(
        _job["folder"],
        trust_remote_code=_trust,
        use_safetensors=True,
        dtype=getattr(torch, _job["dtype"]),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    _model, _report = _loaded
    with torch.no_grad():
        _logits = _model.eval()(torch.tensor(_job["token_ids"])).logits
    save_file({"logits": _logits.contiguous()}, _job["logits"])
    _text_ids = None
    if _job["text"] is not None:
        _text_ids = AutoTokenizer.from_pretrained(_job["folder"], trust_remote_code=_trust)(_job["text"])["input_ids"]
    _config = _model.config
    _keys = ("hidden_act", "hidden_activation", "activation_function", "activation")
    _own = next(getattr(_config, key) for key in _keys if getattr(_config, key, None) is not None)
    _ffns = [
        module for module in _model.modules() if any(kind.__name__ == "SparseFFN" for kind in type(module).__mro__)
    ]
    _seen = {
        "class": type(_model).__name__,
        "activations": [[ffn.activation, ffn.param] for ffn in _ffns] or [[_own, 0.0]] * _config.num_hidden_layers,
        "problems": sorted(str(key) for kind in _report.values() for key in kind),
        "text_ids": _text_ids,
        "imports_prosparse": "prosparse" in sys.modules,
    }
    print(json.dumps(_seen))
