// llama-render MODEL.gguf: the prompt that llama.cpp's own server makes of a conversation, for Ferry's parity gate.
//
// stdin, one JSON object a line:  {"messages": [{"role", "content"}, ...], "add_generation_prompt": true}
// stdout, one line each:          {"prompt": "...", "ids": [...]}, or {"error": "..."} when the template refuses
//
// "template" in a line takes the place of the one inside the GGUF. As llama-server, LM Studio and Ollama do it: llama.cpp's
// Jinja, not Python's; a BOS that the tokenizer adds is cut off the text and added with the ids; special tokens in the text
// are read as such. Not done: the server goes on writing a last message that is the assistant's, and so never closes it.

#include "chat.h"
#include "common.h"
#include "json.h"
#include "llama.h"

#include <iostream>
#include <string>

using json = common_json;

static json rendered(const llama_model * model, const json & asked) {
    // made anew each time: a template's own state must not leak into the next conversation
    const auto templates = common_chat_templates_init(model, asked.value("template", ""));
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(asked.at("messages"));
    inputs.add_generation_prompt = asked.value("add_generation_prompt", true);
    // What `llama-server -m MODEL.gguf` sets and this struct's own defaults do not (server-context.cpp, arg.cpp, common.h):
    // thinking is on where llama.cpp finds that the template can think, else enable_thinking is false (Apertus: disabled),
    // and earlier turns keep their reasoning (DeepSeek V4, GLM 4.7, LFM 2.5 and Nemotron 3 render them differently).
    inputs.enable_thinking = common_chat_templates_support_enable_thinking(templates.get());
    inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
    inputs.chat_template_kwargs["preserve_reasoning"] = "true";
    const std::string prompt = common_chat_templates_apply(templates.get(), inputs).prompt;
    const auto ids = common_tokenize(llama_model_get_vocab(model), prompt, /*add_special=*/true, /*parse_special=*/true);
    return {{"prompt", prompt}, {"ids", ids}};
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::cerr << "usage: llama-render MODEL.gguf\n";
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    auto params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        std::cerr << argv[1] << " cannot be loaded\n";
        return 1;
    }
    for (std::string line; std::getline(std::cin, line);) {
        json answer;
        try {
            answer = rendered(model, json::parse(line));
        } catch (const std::exception & error) {
            answer = {{"error", std::string(error.what())}};
        }
        std::cout << answer.dump_safe() << std::endl;
    }
    llama_model_free(model);
}
