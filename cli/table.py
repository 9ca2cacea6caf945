"""Every command of `ferry`, in the order of use: where it is defined, and the environment that it runs in.

Environments: "core" has the command line and the config only; "data" makes rows; "train" has torch and llama.cpp;
"deploy" runs models. "rows" is "data", or "train" for a base model that is a GGUF, which llama.cpp must read. "present"
is any that is set up already, for the doctor, which changes nothing.
"""

import importlib

import click

SECTIONS = {
    "Begin": {
        "demo": ("cli.train:demo", "train"),
        "init": ("cli.runs:init", "rows"),
        "config": ("cli.train:show_config", "core"),
        "doctor": ("cli.doctor:doctor", "present"),
    },
    "Train (each stage leaves a record in runs/<run>/)": {
        "train": ("cli.train:train", "train"),
        "preview": ("cli.train:preview", "rows"),
        "data": ("cli.train:data", "rows"),
        "plan": ("cli.train:plan", "rows"),
        "preflight": ("cli.train:preflight", "rows"),
        "check": ("cli.train:check", "core"),
        "finetune": ("cli.train:finetune", "train"),
        "evaluate": ("cli.train:evaluate", "train"),
        "export": ("cli.train:export", "train"),
        "verify": ("cli.train:verify", "train"),
        "publish": ("cli.train:publish", "train"),
        "resume": ("cli.train:resume", "train"),
        "runs": ("cli.runs:list_runs", "core"),
        "status": ("cli.runs:status", "core"),
        "clean": ("cli.runs:clean", "core"),
    },
    "Train on another machine, from the laptop": {
        "cloud-to-local": ("cli.cloud:cloud_to_local", "rows"),
        "cloud-stop": ("cli.cloud:cloud_stop", "data"),
        "reproduce": ("cli.cloud:reproduce", "data"),
    },
    "Run the model (on a Mac, or anywhere)": {
        "deploy-mac": ("cli.deploy:deploy_mac", "deploy"),
        "pull": ("cli.deploy:pull", "deploy"),
        "smoke": ("cli.deploy:smoke", "deploy"),
        "modelfile": ("cli.deploy:modelfile", "deploy"),
        "ollama": ("cli.deploy:ollama", "deploy"),
        "lmstudio": ("cli.deploy:lmstudio", "deploy"),
        "summary": ("cli.deploy:summary", "deploy"),
        "chat": ("cli.deploy:chat", "deploy"),
        "serve": ("cli.deploy:serve", "deploy"),
        "models": ("cli.deploy:models", "core"),
        "trace": ("cli.deploy:trace", "deploy"),
        "rollback": ("cli.deploy:rollback", "deploy"),
        "prune": ("cli.deploy:prune", "deploy"),
        "undeploy": ("cli.deploy:undeploy", "deploy"),
    },
    "Ferry itself": {
        "env": ("cli.maintain:env", "core"),
        "deploy-env": ("cli.maintain:deploy_env", "core"),
        "image": ("cli.maintain:image", "core"),
        "shell": ("cli.maintain:shell", "core"),
        "lock": ("cli.maintain:lock", "train"),
        "lock-images": ("cli.maintain:lock_images", "core"),
        "lint": ("cli.maintain:lint", "train"),
        "test-fast": ("cli.maintain:test_fast", "train"),
        "test": ("cli.maintain:test", "train"),
        "test-image": ("cli.maintain:test_image", "train"),
        "bench": ("cli.maintain:bench", "core"),
    },
}
COMMANDS = {name: entry for commands in SECTIONS.values() for name, entry in commands.items()}
# These run in Ferry's image on a machine with Docker and a GPU.
IMAGE_COMMANDS = frozenset(
    [
        "demo",
        "train",
        "preview",
        "data",
        "plan",
        "preflight",
        "finetune",
        "evaluate",
        "export",
        "verify",
        "publish",
        "resume",
    ]
)


def load_command(name: str) -> click.Command:
    """Import and return the command of that name, with its environment set."""
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    assert hasattr(command, "environment"), f"{name} is not a cli.environment.Command"
    command.name, command.environment = name, COMMANDS[name][1]
    return command


def load_all_commands() -> dict[str, click.Command]:
    """Import and return all commands by their names."""
    return {name: load_command(name) for name in COMMANDS}
