// The request on screen as code of three clients: of the same answer as the page's.

import { escaped } from "../format.js";
import { stringify } from "../json.js";
import { messagesOf, requestFor } from "../requests.js";
import { asCompletion } from "./completion.js";

const BASE = new URL("../..", import.meta.url);
export const KEY = "BITDIAL_API_KEY";

// what the clients take by name; the rest is sent by extra_body, where there is one
const TEXT_GENERATION = new Set(["max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p",
  "repetition_penalty", "frequency_penalty", "seed", "stop", "truncate", "top_n_tokens"]);
const OPENAI = new Set(["max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop", "logprobs"]);
const CHAT = new Set([...OPENAI, "top_logprobs"]);

export function curl(state, precision) {
  const { path, body } = requestFor(state, precision);
  return [
    `curl -N ${quoted(new URL(path, BASE).href)}`,
    `-H 'Content-Type: application/json' -H "Authorization: Bearer $${KEY}"`,
    `-d ${quoted(escaped(stringify(body)))}`,
  ].join(" \\\n     ");
}

export function hub(state, precision) {
  const head = `import os\n\nfrom huggingface_hub import InferenceClient\n\nclient = InferenceClient(
    ${python(addressOf(state.model))},
    token=os.environ.get("${KEY}", "-"),
    headers={"X-Precision": ${python(precision)}},
)\n`;
  if (state.mode === "chat") {
    const sent = { messages: messagesOf(state), ...byName(state.parameters, CHAT), stream: true };
    return `${head}chunks = client.chat_completion(\n${named(sent)})\n${printed("delta.content")}`;
  }
  const { accepted, others } = split(state.parameters, TEXT_GENERATION);
  return `${head}${noteOf("text_generation", Object.keys(others))}tokens = client.text_generation(
    ${python(state.prompt)},\n${named({ ...accepted, stream: true })})
for token in tokens:\n    print(token, end="")\n`;
}

export function openai(state, precision) {
  const model = `${state.stats?.model.id ?? "tgi"}:${precision}`;
  const head = `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(
    base_url=${python(new URL("v1", BASE).href)},
    api_key=os.environ.get("${KEY}", "-"),
)\n`;
  if (state.mode === "chat") {
    const sent = { model, messages: messagesOf(state), ...byName(state.parameters, CHAT), stream: true };
    return `${head}chunks = client.chat.completions.create(\n${named(sent)})\n${printed("delta.content")}`;
  }
  const { parameters, lacking } = asCompletion(state.parameters);
  const sent = { model, prompt: state.prompt, ...byName(parameters, OPENAI), stream: true };
  return `${head}${noteOf("/v1/completions", lacking)}chunks = client.completions.create(\n${named(sent)})\n${printed("text")}`;
}

/** The base URL of a model; null: the server's default one. */
const addressOf = (model) =>
  model === null ? BASE.href : new URL(`models/${model.split("/").map(encodeURIComponent).join("/")}`, BASE).href;

function split(parameters, known) {
  const accepted = {};
  const others = {};
  for (const [name, value] of Object.entries(parameters)) (known.has(name) ? accepted : others)[name] = value;
  return { accepted, others };
}

/** The arguments of a client's method that takes these by name and others by `extra_body`. */
function byName(parameters, known) {
  const { accepted, others } = split(parameters, known);
  return Object.keys(others).length ? { ...accepted, extra_body: others } : accepted;
}

const noteOf = (what, lacking) =>
  lacking.length ? `# not quite the request on screen: ${what} has no ${lacking.join(", ")}\n` : "";

const printed = (text) => `for chunk in chunks:\n    print(chunk.choices[0].${text} or "", end="")\n`;

const named = (values) => Object.entries(values).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");

/** A Python literal; JSON's numbers and strings are Python's. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return escaped(stringify(value));
  return `{${Object.entries(value).map(([name, one]) => `${python(name)}: ${python(one)}`).join(", ")}}`;
}

/** One word of a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
