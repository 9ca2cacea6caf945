# Ferry: fine-tune on a GPU machine, run on a Mac. `make` alone prints the manual.
#
# Make is the user's face: every target forwards to the `ferry` command of this checkout, with what was typed, as it was
# typed. `ferry` checks the settings before anything is done, chooses between Ferry's image and this machine, sets up the
# Python environment that the target needs, and runs the stages in their order. GNU Make 3.81 and bash 3.2 are enough.

PYTHON ?= python3
ifneq ($(VENV),)
export FERRY_VENV := $(VENV)
endif
ifneq ($(DEPLOY_VENV),)
export FERRY_DEPLOY_VENV := $(DEPLOY_VENV)
endif

# One word for the shell, whatever is in it.
quoted  = '$(subst ','\'',$(1))'
THIS   := $(call quoted,$(firstword $(MAKEFILE_LIST)))
is_typed = $(filter command%,$(origin $(1)))
# What was typed after `make`, or stands in the environment under one of these names.
TYPED  := $(foreach name,$(.VARIABLES),$(if $(call is_typed,$(name)),$(call quoted,$(name)=$(value $(name)))))
# env: a setting of the shell's, which a target that does not take it leaves alone.
TYPED  += $(foreach name,CONFIG RUN SET RUNS MODELS REPO QUANT,$(if $(filter environment%,$(origin $(name))),$(call quoted,env:$(name)=$(value $(name)))))
# exec: make tells its child of SIGTERM, and a shell between them would not pass it on.
FORWARD = @exec $(PYTHON) $(call quoted,$(dir $(firstword $(MAKEFILE_LIST)))ferry) make $(call quoted,$(MAKECMDGOALS)) $@ $(TYPED)

# A line break would end the shell's command in the middle of a word.
define newline


endef
$(foreach name,$(.VARIABLES),$(if $(call is_typed,$(name)),$(if $(findstring $(newline),$(value $(name))),$(error error: $(name) holds a line break; write it in one line))))

.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

##@ Begin
demo:           ; $(FORWARD) ## train and deploy a 135M model on a CPU, with real weights
init:           ; $(FORWARD) ## write a commented config for your rows: DATA=rows.jsonl
config:         ; $(FORWARD) ## check a config and print it with all defaults
doctor:         ; $(FORWARD) ## what this machine is, has and lacks (SIDE=cloud or mac, REPO=)

##@ Train: each stage leaves a record in runs/<run>/, and a target runs all that come before it
train:          ; $(FORWARD) ## all stages, from where the run stands
preview:        ; $(FORWARD) ## the first rows as they will be trained
data:           ; $(FORWARD) ## 1: rows -> token ids and labels; needs no GPU and no torch
finetune:       ; $(FORWARD) ## 2: LoRA by Unsloth; resumes from its last checkpoint
evaluate:       ; $(FORWARD) ## 3: base model and adapter on held-out rows, in torch
export:         ; $(FORWARD) ## 4: merged 16 bit -> f16 GGUF -> quantized GGUF
verify:         ; $(FORWARD) ## 5: the GGUFs in llama.cpp: same prompt, same answers
publish:        ; $(FORWARD) ## 6: into the hub, manifest.json last
plan:           ; $(FORWARD) ## memory, disk, hours and dollars on each GPU (GPU=, PROBE=1)
preflight:      ; $(FORWARD) ## what would fail at the end: token, repo, licence, disk
check:          ; $(FORWARD) ## what would run again with this config
resume:         ; $(FORWARD) ## a run that another machine began: CHECKPOINTS=you/name
runs:           ; $(FORWARD) ## the runs on this machine
status:         ; $(FORWARD) ## how far a run is
clean:          ; $(FORWARD) ## remove what can be made again

##@ Train on another machine, from the laptop
cloud-to-local: ; $(FORWARD) ## train on CLOUD=ssh://user@host, sky or hf-jobs, then deploy here
cloud-stop:     ; $(FORWARD) ## end the job there; it writes its state first
reproduce:      ; $(FORWARD) ## make REPO again from its manifest, and compare

##@ Run the model, on a Mac or anywhere
deploy-mac:     ; $(FORWARD) ## pull REPO, test it, put it into Ollama and LM Studio
pull:           ; $(FORWARD) ## fetch the GGUF and compare its sha256 (QUANT=q8_0: another one)
smoke:          ; $(FORWARD) ## does it answer here as it did where it was made?
modelfile:      ; $(FORWARD) ## Ollama's Modelfile, from what was trained
ollama:         ; $(FORWARD) ## into Ollama, its prompts proven there (NAME=, START=1)
lmstudio:       ; $(FORWARD) ## into LM Studio's models folder
summary:        ; $(FORWARD) ## what was made, the scores, how to talk to it
chat:           ; $(FORWARD) ## talk to it here (SYSTEM=)
serve:          ; $(FORWARD) ## OpenAI's API on 127.0.0.1:8080 (PORT=)
models:         ; $(FORWARD) ## the versions on this machine
trace:          ; $(FORWARD) ## which run, config and data made FILE=some.gguf
rollback:       ; $(FORWARD) ## the version before, or REPO=model@version
prune:          ; $(FORWARD) ## remove all but the newest versions (KEEP=2)
undeploy:       ; $(FORWARD) ## remove REPO from Ollama, LM Studio and this machine

##@ Ferry itself
env:            ; $(FORWARD) ## the environment that trains: locked packages, llama.cpp
deploy-env:     ; $(FORWARD) ## the one that runs models, without torch
image:          ; $(FORWARD) ## Ferry's image by Docker (DEVICE=cuda or cpu)
shell:          ; $(FORWARD) ## a shell in it
lock:           ; $(FORWARD) ## refresh the pins
lock-images:    ; $(FORWARD) ## freeze the digests of the base images
lint:           ; $(FORWARD) ## ruff, mypy, hadolint, shellcheck, actionlint
test-fast:      ; $(FORWARD) ## the tests that train nothing, two at a time
test:           ; $(FORWARD) ## every test, the real chain included
test-image:     ; $(FORWARD) ## build the CPU image and run the chain in it (root, podman)
bench:          ; $(FORWARD) ## time and memory of the demo, stage by stage

# A mistyped target, also where a file has its name, gets an answer with the closest one.
TARGETS := $(shell awk -F: '/^[a-z-]+: .*FORWARD/ {print $$1}' $(THIS))
UNKNOWN := $(filter-out $(TARGETS) help,$(MAKECMDGOALS))
.PHONY: help $(TARGETS) $(UNKNOWN)
ifneq ($(UNKNOWN),)
$(UNKNOWN):     ; $(FORWARD)
endif

help:
	@awk 'BEGIN {FS = ": *; [^#]*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+: .*## / {printf "  make %-15s %s\n", $$1, $$2}' $(THIS)
	@echo
	@echo 'Settings: CONFIG=configs/yours.yaml, RUN=name, SET="finetune.max_steps=20 finetune.seed=1", ...'
	@echo '          ./ferry TARGET --help lists those of a target, with an example; docs/cli.md has them all.'
