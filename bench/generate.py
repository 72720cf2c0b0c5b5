"""``transformers.generate`` as a process: a request a line in, a line a token out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(model_dir: Path) -> None:
    """Answer requests on standard input until it is closed."""
    import torch  # noqa: PLC0415 - the program says what it is before it takes seconds
    from transformers import (  # noqa: PLC0415 - as above
        AutoModelForCausalLM,
        AutoTokenizer,
    )
    from transformers.generation.streamers import BaseStreamer  # noqa: PLC0415 - as above

    # The library's annotations cover every tokenizer and model there is; ours is one.
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.eval()

    def say(fact: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()

    class Lines(BaseStreamer):
        """Says each token as it comes; the first call brings the prompt."""

        def __init__(self) -> None:
            self._in_prompt = True

        def put(self, value: Any) -> None:
            if not self._in_prompt:
                say({"text": tokenizer.decode(value.tolist())})
            self._in_prompt = False

        def end(self) -> None:
            """The request's last line says it."""

    say({"ready": True})
    for request_line in sys.stdin:
        request = json.loads(request_line)
        prompt = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = request["max_tokens"]
        with torch.inference_mode():
            model.generate(
                **prompt,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                streamer=Lines(),
            )
        say({"prompt": prompt["input_ids"].shape[1]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
