# Ferry: fine-tune on a GPU, run on a Mac. `make` alone prints the manual.
# Every stage leaves one record, runs/<run>/<stage>.json, written last: its existence is all that Make asks for, so the
# records hang together by order-only prerequisites and no clock ever repeats hours of work. `check` asks the rest.
# GNU Make 3.81 and bash 3.2 (macOS) are enough.

CONFIG ?= configs/demo.yaml
RUN    ?= $(basename $(notdir $(CONFIG)))
SET    ?=
RUNS   ?= runs
MODELS ?= models
REPO   ?= ./hub/$(RUN)
QUANT  ?=
LIGHT  ?=
VENV   ?= $(if $(LIGHT),.venv-light,.venv)
PYTHON ?= python3

R        := $(RUNS)/$(RUN)
SETS     := $(foreach override,$(SET),--set '$(override)')
PIPELINE := $(VENV)/bin/python -m pipeline
DEPLOY   := $(VENV)/bin/python -m deploy
WHICH    := '$(REPO)' --models '$(MODELS)'
# What would be noticed only after hours of GPU time is asked before the first of them.
PREFLIGHT := $(if $(filter train,$(MAKECMDGOALS)),preflight)

# On a Mac Unsloth would look for MLX; the demo's code path is the CPU one.
ifeq ($(shell uname -s),Darwin)
export UNSLOTH_FORCE_CPU ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help demo train check preflight deploy-mac pull smoke modelfile summary models remove env lock test bench \
        config preview data finetune evaluate export verify publish

##@ Everywhere

demo: ## the whole chain on a CPU with real weights: train, deploy, before and after
	@$(MAKE) --no-print-directory train CONFIG=configs/demo.yaml
	@$(MAKE) --no-print-directory deploy-mac CONFIG=configs/demo.yaml

config: env ## print the resolved config and what its choices cost
	@$(PIPELINE) config $(CONFIG) $(SETS)

##@ On the GPU box (in this order; each is a stage and a record in runs/<run>/)

train: check $(R)/publish.json ## all of the following, from where it stands
	@echo "train: complete, $(R)/publish.json"

preview: env ## three rows as they will be trained, what carries loss in colour; writes nothing
	@$(PIPELINE) data $(CONFIG) --run $(R) $(SETS) --preview 3
data: $(R)/data.json ## rows -> token ids and labels; freezes the config (LIGHT=1: no torch needed)
finetune: check $(R)/finetune.json ## LoRA by Unsloth; continues from its last checkpoint
evaluate: check $(R)/evaluate.json ## base and adapter on held-out rows, in torch
export: check $(R)/export.json ## merged 16 bit -> f16 GGUF -> quantized GGUF
verify: check $(R)/verify.json ## the GGUFs in llama.cpp: same prompt, same answers
publish: check $(R)/publish.json ## into the hub, manifest.json last

check: env ## does the run still fit its config, inputs and records?
	@$(PIPELINE) check $(CONFIG) --run $(R) $(SETS)

preflight: check ## token, repo, base, licence, data set, disk: asked before any GPU work
	@$(PIPELINE) preflight $(CONFIG) --run $(R) $(SETS)

$(R)/data.json: | check $(PREFLIGHT)
	@$(PIPELINE) data $(CONFIG) --run $(R) $(SETS)
$(R)/finetune.json: | $(R)/data.json
	@$(PIPELINE) finetune --run $(R)
$(R)/evaluate.json: | $(R)/finetune.json
	@$(PIPELINE) evaluate --run $(R)
$(R)/export.json: | $(R)/evaluate.json
	@$(PIPELINE) export --run $(R)
$(R)/verify.json: | $(R)/export.json
	@$(PIPELINE) verify --run $(R)
$(R)/publish.json: | $(R)/verify.json
	@$(PIPELINE) publish --run $(R)

##@ On the Mac (or any machine that runs the model)

deploy-mac: summary ## pull REPO, check it, smoke test, Modelfile
pull: env ## fetch the GGUF and compare its sha256 with the manifest (QUANT=q8_0: another one)
	@$(DEPLOY) pull $(WHICH) $(if $(QUANT),--quantization $(QUANT))
smoke: pull ## does it answer here as it did where it was made?
	@$(DEPLOY) smoke $(WHICH)
modelfile: smoke ## Ollama's Modelfile, from what was trained
	@$(DEPLOY) modelfile $(WHICH)
summary: modelfile ## what was made, the scores, real answers, the next commands
	@$(DEPLOY) summary $(WHICH)
models: env ## the versions on this machine
	@$(DEPLOY) list --models '$(MODELS)'
remove: env ## delete REPO (or one version: REPO=you/model@v1) from this machine
	@$(DEPLOY) remove $(WHICH)

##@ Ferry itself

env: ## locked Python environment and llama.cpp, built once (cached in ~/.cache/ferry)
	@$(PYTHON) setup/env.py --venv $(VENV) $(if $(LIGHT),--light)
lock: env ## refresh the pins and show what changed
	@$(VENV)/bin/python setup/lock.py
test: env ## every test, the real chain on real weights included
	@$(VENV)/bin/python -m pytest
bench: env ## time and memory of the demo, stage by stage (benchmarks/results/)
	@bash benchmarks/demo.sh

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Settings: CONFIG=$(CONFIG) RUN=$(RUN) REPO=$(REPO)"
	@echo '          SET="finetune.max_steps=20 finetune.seed=1" overrides single values of the config'
	@echo '          QUANT=q8_0 with pull and deploy-mac: another GGUF of the repo than its default'
	@echo '          LIGHT=1 with data and preview: an environment without torch, for a laptop'
