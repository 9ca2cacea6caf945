"""Run llama.cpp's converter and add Ferry's own key-values to the GGUF. It is a program because the converter is one.

python convert.py <llama.cpp's convert folder> <key-values.json> <the converter's own arguments>
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Patch the converter so that it writes the key-values, then run it."""
    convert_folder, key_values = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(convert_folder))
    add_key_values(key_values)
    script = convert_folder / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


def add_key_values(key_values: dict[str, str]) -> None:
    """Make the converter write these key-values, besides its own."""
    from conversion.base import ModelBase

    original_prepare = ModelBase.prepare_metadata

    def prepare_metadata(self, vocab_only: bool) -> None:
        original_prepare(self, vocab_only)
        for key, value in key_values.items():
            self.gguf_writer.add_string(key, value)

    ModelBase.prepare_metadata = prepare_metadata


if __name__ == "__main__":
    main()
