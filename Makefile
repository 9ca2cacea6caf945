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
# A private repo of the Hub that gets the newest checkpoint, so that another machine can go on; for the stages by its name.
CHECKPOINTS ?= $(FERRY_CHECKPOINTS)
export FERRY_CHECKPOINTS := $(if $(filter cloud-to-local cloud-stop reproduce,$(MAKECMDGOALS)),,$(CHECKPOINTS))
# What launches elsewhere needs no more than a laptop has, but for a base that is a GGUF, which llama.cpp must read; where
# the whole environment is there already, it does.
ifeq ($(origin LIGHT),undefined)
WHOLE := $(if $(filter cloud-to-local,$(MAKECMDGOALS)),$(shell grep -lE '^ *model: *(pypi:|.*[.]gguf)' '$(CONFIG)' 2>/dev/null))
LIGHT := $(if $(filter cloud-to-local cloud-stop reproduce,$(MAKECMDGOALS)),$(if $(WHOLE)$(wildcard .venv/ferry.json),,1))
endif
VENV   ?= $(if $(LIGHT),.venv-light,.venv)
# The side that runs models has a light one of its own. A VENV that was asked for serves both sides.
DEPLOY_VENV ?= $(if $(filter command environment%,$(origin VENV)),$(VENV),.venv-deploy)
PYTHON ?= python3

R        := $(RUNS)/$(RUN)
SETS     := $(foreach override,$(SET),--set '$(override)')
PIPELINE := $(VENV)/bin/python -m pipeline
LAUNCH   := $(VENV)/bin/python -m launch
DEPLOY   := '$(DEPLOY_VENV)/bin/python' -m deploy
# One word for the shell, whatever is in it.
quoted    = '$(subst ','\'',$(1))'
WHICH    := $(call quoted,$(REPO)) --models $(call quoted,$(MODELS))
TAKEN    := $(if $(QUANT),--quantization $(call quoted,$(QUANT)))
# Only what was typed: shells and systems have variables of these names, too (NAME, HOST, PORT).
typed     = $(if $(filter command%,$(origin $(1))),$($(1)))
CALLED   := $(if $(call typed,NAME),--name $(call quoted,$(NAME)))
STARTED  := $(if $(call typed,START),--start)
LISTENS  := $(if $(call typed,PORT),--port $(call quoted,$(PORT))) $(if $(call typed,HOST),--host $(call quoted,$(HOST)))
# What is not installed on this Mac is no reason not to go on with the rest.
AMONG    := $(if $(filter deploy-mac,$(MAKECMDGOALS)),--optional)
# What would be noticed only after hours of GPU time is asked before the first of them.
PREFLIGHT := $(if $(filter train,$(MAKECMDGOALS)),preflight)

# How the image is asked for: here, or where the run goes.
IMAGING  := DOCKER IMAGE DEVICE ENGINE MOUNT DOCKER_BUILD_FLAGS DOCKER_RUN_FLAGS
ASKED    := $(foreach name,$(IMAGING),$(if $(call typed,$(name)),$(call quoted,$(name)=$($(name)))))
# A command for a shell: its $ are not make's.
ENDING   := $(if $(call typed,TEARDOWN),--teardown $(call quoted,$(value TEARDOWN)))
ELSEWHERE := $(foreach name,$(IMAGING),$(if $(call typed,$(name)),--pass $(call quoted,$(name)=$($(name))))) \
    $(if $(call typed,CLOUD),--cloud $(call quoted,$(CLOUD))) $(ENDING) \
    $(if $(call typed,MAX_DOLLARS),--max-dollars $(call quoted,$(MAX_DOLLARS))) $(if $(call typed,YES),--yes)
# Of those that a machine is rented for.
RENTED    := $(if $(CHECKPOINTS),--checkpoints $(call quoted,$(CHECKPOINTS))) $(if $(call typed,SPOT),--spot)
RENTING   := $(if $(call typed,GPU),--gpu $(call quoted,$(GPU))) $(if $(call typed,HOURS),--hours $(call quoted,$(HOURS)))

# Whose `make doctor` it is: what was typed decides (SIDE, or REPO for mac), else cloud in the image and where there is an
# NVIDIA driver. `make deploy-mac` means its own, always.
SIDED     = $(or $(call typed,SIDE),$(if $(filter-out file,$(origin REPO)),mac),$(if $(FERRY_IMAGE)$(shell command -v nvidia-smi 2>/dev/null),cloud,mac))
DOCTOR    := $(if $(filter deploy-mac,$(MAKECMDGOALS)),mac,$(if $(filter doctor,$(MAKECMDGOALS)),$(SIDED),mac))
ifeq ($(filter cloud mac,$(DOCTOR)),)
$(error SIDE=$(DOCTOR): neither cloud nor mac)
endif

# Where the cloud side runs: natively, or in Ferry's image (docker/). What was typed decides, else what this machine is;
# setup/container.py says which and why. Inside the image FERRY_IMAGE is set, and the graph is run as it is.
CONTAINER := $(PYTHON) setup/container.py
IMAGED    := demo train resume restore check preflight config preview data plan finetune evaluate export verify publish $(if $(filter cloud,$(DOCTOR)),doctor)
PASSED    := $(if $(filter cloud,$(DOCTOR)),SIDE=cloud) $(foreach name,CONFIG RUN SET RUNS MODELS REPO QUANT GPU PROBE CHECKPOINTS,$(if $(filter-out undefined file,$(origin $(name))),$(call quoted,$(name)=$(subst $$,$$$$,$($(name))))))
ifeq ($(FERRY_IMAGE)$(FERRY_WHERE)$(LIGHT),)
ifneq ($(filter $(IMAGED),$(MAKECMDGOALS)),)
export FERRY_WHERE := $(shell $(CONTAINER) where $(ASKED) -- $(firstword $(MAKECMDGOALS)))
endif
endif

# On a Mac Unsloth would look for MLX; the demo's code path is the CPU one.
ifeq ($(shell uname -s),Darwin)
export UNSLOTH_FORCE_CPU ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help demo train resume restore check preflight config preview data plan finetune evaluate export verify publish \
        cloud-to-local cloud-stop reproduce deploy-mac doctor pull smoke modelfile ollama lmstudio summary chat serve models trace rollback prune undeploy \
        image shell env deploy-env lock lock-images test test-image lint bench

ifeq ($(FERRY_WHERE),image)
$(IMAGED):
	@$(CONTAINER) run $(ASKED) -- $@ $(PASSED)
else ifeq ($(FERRY_WHERE),refused)
$(IMAGED):
	@exit 2
else

##@ Everywhere

demo: ## the whole chain on a CPU with real weights: train, deploy, before and after
	@$(MAKE) -f '$(firstword $(MAKEFILE_LIST))' --no-print-directory train CONFIG=configs/demo.yaml
	@$(MAKE) -f '$(firstword $(MAKEFILE_LIST))' --no-print-directory deploy-mac CONFIG=configs/demo.yaml

config: env ## print the resolved config and what its choices cost
	@$(PIPELINE) config $(CONFIG) $(SETS)

##@ On the GPU box (in this order; each is a stage and a record in runs/<run>/)

# It asks the environment that is there, as it is: `env` would refuse a driver that broke since, and say less about it.
ifeq ($(DOCTOR),cloud)
doctor: $(if $(wildcard $(VENV)/ferry.json),,env) ## driver, cards, libraries, disk: what is there, what lacks, what cures it (without a driver: SIDE=cloud)
	@$(PIPELINE) doctor --runs $(call quoted,$(RUNS))
endif
train: check $(R)/publish.json ## all of the following, from where it stands
	@echo "train: complete, $(R)/publish.json"

resume: env ## a run that another machine began, from its checkpoints alone (CHECKPOINTS=you/name)
	@run=$$($(PIPELINE) resume --runs $(call quoted,$(RUNS))) && \
	$(MAKE) -f '$(firstword $(MAKEFILE_LIST))' --no-print-directory train CONFIG=$(call quoted,$(RUNS))/"$$run"/config.yaml RUN="$$run" SET=

preview: env ## three rows as they will be trained, what carries loss in colour; writes nothing
	@$(PIPELINE) data $(CONFIG) --run $(R) $(SETS) --preview 3
data: $(R)/data.json ## rows -> token ids and labels; freezes the config (LIGHT=1: no torch needed)
plan: $(if $(wildcard $(R)/data.json),env,$(R)/data.json) ## memory, disk, steps, hours, money and the cheapest card, from the rows (GPU="RTX 4090"; LIGHT=1; PROBE=1 measures)
	@$(PIPELINE) plan $(CONFIG) --run $(R) $(SETS) $(if $(call typed,GPU),--gpu $(call quoted,$(GPU))) $(if $(call typed,PROBE),--probe)
finetune: check $(R)/finetune.json ## LoRA by Unsloth; continues from its last checkpoint
evaluate: check $(R)/evaluate.json ## base and adapter on held-out rows, in torch
export: check $(R)/export.json ## merged 16 bit -> f16 GGUF -> quantized GGUF
verify: check $(R)/verify.json ## the GGUFs in llama.cpp: same prompt, same answers
publish: check $(R)/publish.json ## into the hub, manifest.json last

# Where CHECKPOINTS is given and this machine has nothing of the run, it begins with what is there.
restore: env
	@$(PIPELINE) restore $(CONFIG) --run $(R) $(SETS)

check: env $(if $(CHECKPOINTS),restore) ## does the run still fit its config, inputs and records?
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

endif

##@ From the laptop, on another machine

cloud-to-local: env ## train CONFIG on CLOUD=ssh://user@box[:port][/folder], sky or hf-jobs, then deploy-mac; again: it goes on, or watches
	@$(LAUNCH) cloud $(CONFIG) --run $(R) $(SETS) $(ELSEWHERE) $(RENTED) $(RENTING)
	@$(MAKE) -f '$(firstword $(MAKEFILE_LIST))' --no-print-directory deploy-mac REPO="$$($(LAUNCH) repo --run $(R))"; \
	code=$$?; $(LAUNCH) billing --run $(R); exit $$code
cloud-stop: env ## the run there writes its state and ends; the folder stays
	@$(LAUNCH) stop --run $(R) --cloud $(call quoted,$(CLOUD)) $(ENDING) $(RENTED)
reproduce: env ## REPO=you/model@tag again, from its manifest alone (CLOUD=, DATA=), and a table: the same or not
	@$(LAUNCH) reproduce $(call quoted,$(REPO)) --runs $(call quoted,$(RUNS)) $(ELSEWHERE) $(if $(call typed,DATA),--data $(call quoted,$(DATA)))

##@ On the Mac (or any machine that runs the model)

deploy-mac: summary ## pull REPO, check it, smoke test, then into Ollama and LM Studio
ifneq ($(DOCTOR),cloud)
doctor: deploy-env ## what this machine is, has and lacks, and the command that cures it (on the GPU box: SIDE=mac or REPO=)
	@$(DEPLOY) doctor $(if $(filter-out file,$(origin REPO))$(filter deploy-mac,$(MAKECMDGOALS)),$(WHICH) $(TAKEN))
endif
pull: $(if $(filter deploy-mac,$(MAKECMDGOALS)),doctor,deploy-env) ## fetch the GGUF and compare its sha256 with the manifest (QUANT=q8_0: another one)
	@$(DEPLOY) pull $(WHICH) $(TAKEN)
smoke: pull ## does it answer here as it did where it was made?
	@$(DEPLOY) smoke $(WHICH)
modelfile: smoke ## Ollama's Modelfile, from what was trained
	@$(DEPLOY) modelfile $(WHICH)
ollama: modelfile ## create it in Ollama, prove its prompts there, then make it NAME:latest
	@$(DEPLOY) ollama $(WHICH) $(CALLED) $(STARTED) $(AMONG)
lmstudio: $(if $(filter deploy-mac,$(MAKECMDGOALS)),ollama,smoke) ## put it into LM Studio's models folder
	@$(DEPLOY) lmstudio $(WHICH) $(AMONG)
summary: $(if $(filter deploy-mac,$(MAKECMDGOALS)),lmstudio,modelfile) ## what was made, the scores, real answers, how to talk to it
	@$(DEPLOY) summary $(WHICH)

chat: deploy-env ## talk to it here, in llama.cpp
	@$(DEPLOY) chat $(WHICH)
serve: deploy-env ## OpenAI's API on 127.0.0.1:8080 (PORT=)
	@$(DEPLOY) serve $(WHICH) $(LISTENS)
models: deploy-env ## the versions on this machine
	@$(DEPLOY) list --models $(call quoted,$(MODELS))
trace: deploy-env ## which run, config, data and code made it (FILE=some.gguf, or a model's NAME in Ollama)
	@$(DEPLOY) trace $(call quoted,$(or $(FILE),$(call typed,NAME))) --models $(call quoted,$(MODELS))
rollback: deploy-env ## back to the version before (or REPO=you/model@v1), in Ollama and LM Studio too
	@$(DEPLOY) rollback $(WHICH) $(STARTED)
prune: deploy-env ## remove all but the newest versions (KEEP=2) and the one in use
	@$(DEPLOY) prune $(WHICH) $(STARTED) $(if $(call typed,KEEP),--keep $(call quoted,$(KEEP)))
undeploy: deploy-env ## remove REPO (or one version: REPO=you/model@v1) from Ollama, LM Studio and this machine
	@$(DEPLOY) undeploy $(WHICH) $(STARTED)

##@ Ferry itself

image: ## Ferry's image by Docker (DEVICE=cuda or cpu, IMAGE=name:tag)
	@$(CONTAINER) build $(ASKED)
shell: ## a shell in it, with the mounts of `make train`
	@$(CONTAINER) shell $(ASKED)
ifdef FERRY_IMAGE
env deploy-env: # baked in
else
env: ## locked Python environment and llama.cpp, built once (cached in ~/.cache/ferry)
	@$(PYTHON) setup/env.py --venv '$(VENV)' $(if $(LIGHT),--light)
deploy-env: ## the light one that runs models: no torch, llama.cpp ready-made if there is a wheel
	@$(PYTHON) setup/env.py --deploy --venv '$(DEPLOY_VENV)'
endif
lock: env ## refresh the pins and show what changed
	@$(VENV)/bin/python setup/lock.py
lock-images: ## freeze the digest of each base image (asks a registry, by skopeo or docker)
	@$(PYTHON) setup/pin.py
lint: env ## ruff, hadolint, shellcheck, actionlint
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash setup/lint.sh
test: env ## every test, the real chain on real weights included
	@$(VENV)/bin/python -m pytest $(if $(filter test-image,$(MAKECMDGOALS)),,-m 'not image')
test-image: $(if $(filter test,$(MAKECMDGOALS)),test,env) ## build the CPU image and run the chain in it (root, podman)
	@$(if $(filter test,$(MAKECMDGOALS)),:,$(VENV)/bin/python -m pytest -m image)
bench: env ## time and memory of the demo, stage by stage (benchmarks/results/)
	@bash benchmarks/demo.sh

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Settings: CONFIG=$(CONFIG) RUN=$(RUN) REPO=$(REPO)"
	@echo '          SET="finetune.max_steps=20 finetune.seed=1" overrides single values of the config'
	@echo '          QUANT=q8_0 with pull and deploy-mac: another GGUF of the repo than its default'
	@echo '          NAME=my-model: what Ollama calls it; START=1: start its server when none answers'
	@echo '          DOCKER=1 or 0: the cloud side in the image, or natively; IMAGE=name:tag takes a ready one,'
	@echo '          MOUNT="/data /models" shows it more folders of this machine'
	@echo '          CLOUD=ssh://user@box:port/folder for another machine; YES=1 does not ask, MAX_DOLLARS=5 refuses more,'
	@echo '          CLOUD=sky (SPOT=1) or hf-jobs rents one: GPU="L4", HOURS=3 is its time limit; CHECKPOINTS=you/name for a box'
	@echo '          TEARDOWN="command" ends what bills, whatever came of it; DEVICE=cpu takes a box without a GPU'
	@echo '          LIGHT=1 with data and preview: an environment without torch, for a laptop'
