// @huggingface/inference against a server: a JSON line for each call. scripts/check_clients.py runs it.
//     node calls.mjs ADDRESS
import { InferenceClient } from "@huggingface/inference";

const address = process.argv[2];
const client = new InferenceClient("hf_none");
const prompt = { inputs: "The with statement", parameters: { max_new_tokens: 4 } };
const chat = { messages: [{ role: "user", content: "Hi" }], max_tokens: 4 };

async function call(name, work) {
  let error = null;
  try {
    const text = await work();
    if (typeof text !== "string" || text.length === 0) error = `no text: ${JSON.stringify(text)}`;
  } catch (problem) {
    error = `${problem.message} ${JSON.stringify(problem.httpResponse?.body ?? "")}`;
  }
  console.log(`{"call":${JSON.stringify(name)},"error":${JSON.stringify(error)}}`);
}

async function joined(stream, textOf) {
  let text = "";
  for await (const event of stream) text += textOf(event) ?? "";
  return text;
}

const message = (answer) => answer.choices[0].message.content;
const delta = (event) => event.choices[0]?.delta.content;
// for an address without a provider it reads the stream format of /v1/completions, despite its types
const token = (event) => event.token?.text ?? event.choices[0]?.text;

for (const [where, endpointUrl] of [["", address], [" under /v1", `${address}/v1`]]) {
  await call(`chatCompletion${where}`, async () => message(await client.chatCompletion({ ...chat, endpointUrl })));
  await call(`chatCompletionStream${where}`, () => joined(client.chatCompletionStream({ ...chat, endpointUrl }), delta));
}
const there = { ...prompt, endpointUrl: address };
await call("textGeneration", async () => (await client.textGeneration(there)).generated_text);
await call("textGenerationStream", () => joined(client.textGenerationStream(there), token));
const endpoint = client.endpoint(address);
await call("endpoint().chatCompletion", async () => message(await endpoint.chatCompletion(chat)));
await call("endpoint().textGeneration", async () => (await endpoint.textGeneration(prompt)).generated_text);
