// The request on screen as code of three clients.

import { el } from "../dom.js";
import { requestFor } from "../requests.js";

const BASE = new URL("../..", import.meta.url);
const TYPES = [["curl", curl], ["huggingface_hub", hub], ["openai", openai]];
const KEY = "BITDIAL_API_KEY";

export function mount(section, api, state) {
  const blocks = TYPES.map(([name, code]) => new Block(name, code));
  section.setAttribute("aria-labelledby", "snippets-heading");
  section.append(
    el("h2", { id: "snippets-heading" }, "Snippets"),
    el("p", { className: "hint" }, `The request on screen. If the server has a key, export it as ${KEY}; otherwise any value does.`),
    ...blocks.map((block) => block.element),
  );
  const update = (current, patch = current) => {
    if (Object.keys(patch).every((key) => key === "stats")) return;
    const precision = current.precisions[0] ?? "fp32";
    for (const block of blocks) block.show(current, precision);
  };
  state.subscribe(update);
  update(state.get());
}

class Block {
  constructor(name, code) {
    this.code = code;
    this.text = el("code");
    this.copied = el("span", { role: "status", "aria-live": "polite" });
    const copy = el("button", { type: "button", "aria-label": `Copy the ${name} snippet`, onclick: () => this.#copy() }, "Copy");
    this.element = el("div", { className: "snippet" }, el("h3", {}, name, " ", copy, " ", this.copied),
      el("pre", { tabIndex: 0, role: "region", "aria-label": `${name} snippet` }, this.text));
    this.element.dataset.client = name;
  }

  show(state, precision) {
    this.text.textContent = this.code(state, precision);
    this.copied.textContent = "";
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.text.textContent);
      this.copied.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.text); // without a secure context: selected, to be copied by hand
      this.copied.textContent = "Selected";
    }
  }
}

function curl(state, precision) {
  const { path, body } = requestFor(state, precision);
  return [
    `curl -N ${quoted(new URL(path, BASE).href)}`,
    `-H 'Content-Type: application/json' -H "Authorization: Bearer $${KEY}"`,
    `-d ${quoted(JSON.stringify(body))}`,
  ].join(" \\\n     ");
}

function hub(state, precision) {
  const head = `import os\n\nfrom huggingface_hub import InferenceClient\n\nclient = InferenceClient(
    ${python(base())},
    token=os.environ.get("${KEY}", "-"),
    headers={"X-Precision": ${python(precision)}},
)\n`;
  const { parameters } = state;
  if (state.mode === "chat") {
    const { body } = requestFor(state, precision);
    const { accepted, others } = split(parameters, CHAT);
    return `${head}chunks = client.chat_completion(\n${named({ messages: body.messages, ...accepted, ...extra(others), stream: true })})
for chunk in chunks:\n    print(chunk.choices[0].delta.content or "", end="")\n`;
  }
  const { accepted, others } = split(parameters, TEXT);
  const note = Object.keys(others).length ? `# not offered by this client: ${Object.keys(others).join(", ")}\n` : "";
  return `${head}${note}tokens = client.text_generation(\n    ${python(state.prompt)},\n${named({ ...accepted, stream: true })})
for token in tokens:\n    print(token, end="")\n`;
}

function openai(state, precision) {
  const model = `${state.stats?.model.id ?? "bundled"}:${precision}`;
  const head = `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(
    base_url=${python(new URL("v1", BASE).href)},
    api_key=os.environ.get("${KEY}", "-"),
)\n`;
  const { max_new_tokens: max, ...rest } = state.parameters;
  const parameters = { ...rest, ...(max !== undefined && { max_tokens: max }) };
  const chat = state.mode === "chat";
  const { accepted, others } = split(parameters, chat ? CHAT : COMPLETION);
  if (chat) {
    const { messages } = requestFor(state, precision).body;
    return `${head}chunks = client.chat.completions.create(\n${named({ model, messages, ...accepted, ...extra(others), stream: true })})
for chunk in chunks:\n    print(chunk.choices[0].delta.content or "", end="")\n`;
  }
  const sent = Object.fromEntries(Object.entries(others).filter(([name]) => OPENAI_EXTRA.has(name)));
  const lost = Object.keys(others).filter((name) => !OPENAI_EXTRA.has(name));
  const note = lost.length ? `# not offered by this dialect: ${lost.join(", ")}\n` : "";
  return `${head}${note}chunks = client.completions.create(\n${named({ model, prompt: state.prompt, ...accepted, ...extra(sent), stream: true })})
for chunk in chunks:\n    print(chunk.choices[0].text, end="")\n`;
}

const TEXT = new Set(["max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
  "frequency_penalty", "seed", "stop", "truncate", "top_n_tokens"]);
const CHAT = new Set(["max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop",
  "logprobs", "top_logprobs"]);
const COMPLETION = new Set(["max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop"]);
const OPENAI_EXTRA = new Set(["top_k", "min_p", "repetition_penalty", "ignore_eos"]);

function split(parameters, known) {
  const accepted = {};
  const others = {};
  for (const [name, value] of Object.entries(parameters)) (known.has(name) ? accepted : others)[name] = value;
  return { accepted, others };
}

const extra = (others) => (Object.keys(others).length ? { extra_body: others } : {});
const base = () => BASE.href.replace(/\/$/, "");

function named(values) {
  return Object.entries(values).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
}

/** A Python literal: JSON's strings are Python's, if no lone surrogate is in them. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** One word of a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
