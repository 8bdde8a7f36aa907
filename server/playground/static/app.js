// Starts the page: the state, the API, and every part in its place.
import { Api } from "./api.js";
import { drawControls, examplePrompt } from "./controls.js";
import { continued, drawConversation } from "./conversation.js";
import { HEAT } from "./divergence.js";
import { byId, el } from "./dom.js";
import { bytes, visible } from "./format.js";
import { askKey } from "./key.js";
import { mountMode } from "./mode.js";
import { modelInAddress, mountModels } from "./models.js";
import { isToBeLoaded, mountPicker } from "./picker.js";
import { Runner } from "./run.js";
import { ServerWatch } from "./server.js";
import { createState } from "./state.js";
import { mountSystem } from "./system.js";

const PANELS = ["precisions", "report", "snippets"]; // a section and a module each

const state = createState();
const api = new Api(askKey);
const places = { columns: byId("columns"), bars: byId("bars") };
const runner = new Runner(api, state, places, continueWith);
const watch = new ServerWatch(api, state, showConnection, leaveUnknownModel);
let openapi = null;
let asksControls = false;
let followsLoaded = true; // until the user chooses or runs
let awaitsPrecisions = false; // whether Run was pressed while there was none to run yet
let answered = false; // whether the conversation has to go on with one of the columns' answers

function showConnection(error) {
  const line = byId("connection");
  line.hidden = error === null;
  line.textContent = error ? visible(`${error.message}${error.status ? "" : " Trying again…"}`) : "";
  if (error === null) status("The server can be reached again.");
}

function status(text) {
  byId("status").textContent = text;
}

function showModel({ stats, info }) {
  if (!stats || !info) return;
  const { id, parameters, context_length: context } = stats.model;
  const size = parameters ? `${(parameters / 1e6).toPrecision(3)} M parameters, ` : "";
  const { device_name: device, cpu_threads: threads, memory } = stats.host;
  const host = `${device ?? stats.host.device}, ${threads} thread${threads === 1 ? "" : "s"}, ${bytes(memory.available_bytes)} free`;
  byId("model").textContent = visible(`${id}: ${size}context ${context}; on ${host}`);
}

async function run() {
  if (runner.running) return;
  const { prompt, precisions: chosen, mode } = state.get();
  if (followsLoaded && isToBeLoaded(state.get())) return awaitPrecisions();
  if (!chosen.length) return status("Choose at least one precision.");
  followsLoaded = false;
  keepAnswer(prompt);
  setRunning(true);
  watch.refresh();
  status(`Running ${chosen.join(", ")}…`);
  const summary = await runner.start();
  setRunning(false);
  status(summary);
  answered = mode === "chat" && runner.columns.some((column) => column.finish);
  if (answered) byId("prompt").select();
  watch.refresh();
}

/** Runs what is loaded as soon as something is, unless stopped. */
function awaitPrecisions() {
  awaitsPrecisions = true;
  setRunning(true);
  status("Waiting for a precision to be loaded…");
  watch.refresh(); // and then as often as while something runs
}

/** Returns whether it was waiting. */
function stopAwaiting() {
  if (!awaitsPrecisions) return false;
  awaitsPrecisions = false;
  setRunning(false);
  return true;
}

function stop() {
  if (stopAwaiting()) status("Stopped.");
  else runner.stop();
}

/** The next turn of the conversation follows this column's answer. */
function continueWith(column) {
  if (!column.finish) return;
  take(column, "");
  byId("prompt").focus();
}

/** Where the user has chosen no answer to go on with, it is the first one. */
function keepAnswer(prompt) {
  if (answered) take(runner.columns.find((column) => column.finish), prompt);
}

function take(column, prompt) {
  answered = false;
  state.set({ messages: continued(runner.asked, column), prompt });
  runner.clear();
}

/** The page is about this model from here on: its precisions, figures and panels; the conversation goes on. */
function chooseModel(model) {
  keepAnswer(state.get().prompt);
  stopAwaiting();
  runner.clear();
  status("");
  followsLoaded = true;
  byId("model").textContent = "Loading…";
  state.set({ model, stats: null, info: null, precisions: [] });
  return watch.refresh();
}

/** Of a link, or of a server that has changed: the default model instead. */
function leaveUnknownModel() {
  const { model } = state.get();
  followsLoaded = true;
  state.set({ model: null, stats: null, info: null, precisions: [] });
  status(visible(`There is no model ${model} here: this is the default one.`));
}

function setRunning(running) {
  byId("run").disabled = running;
  byId("stop").disabled = !running;
}

function clear() {
  answered = false;
  stopAwaiting();
  runner.clear();
  state.set({ prompt: "", messages: [] });
  status("");
}

function drawLegend() {
  const steps = HEAT.map((limit, index) => el("span", { className: "token" }, `≥ ${limit}`));
  steps.forEach((step, index) => (step.dataset.heat = index + 1));
  byId("legend").append(
    el("p", { className: "hint" }, "Tint: how far the log-probability of a token is from the reference's, in nats: ",
      ...steps.flatMap((step) => [step, " "]), "· ", el("span", { className: "token first" }, "first divergence"),
      " · ", el("span", { className: "token after" }, "after it"), ": other context, so not compared. ",
      "Times “in this tab” are as it sees them, with the network and the loading of a precision; the others are the server's own. ",
      "Precisions that run at the same time share the host."),
  );
}

function update(current, patch = current) {
  if ("stats" in patch || "info" in patch) showModel(current);
  if ("messages" in patch || "mode" in patch) drawConversation(byId("conversation"), current);
  if ("mode" in patch && openapi) drawControls(byId("parameters"), openapi, state);
  if ("prompt" in patch && byId("prompt").value !== current.prompt) byId("prompt").value = current.prompt;
  if (patch.stats && followsLoaded) chooseLoaded(current);
  if (patch.stats && !isToBeLoaded(current) && stopAwaiting()) run();
  if (patch.stats) loadControls();
}

/** The sampling controls and the example, tried again with each reading of the statistics until they are here. */
async function loadControls() {
  if (openapi || asksControls) return;
  asksControls = true;
  try {
    openapi = await api.get("openapi.json");
    drawControls(byId("parameters"), openapi, state);
    const isUntouched = !state.get().prompt && document.activeElement !== byId("prompt");
    if (isUntouched && state.get().mode === "complete") state.set({ prompt: examplePrompt(openapi) });
  } catch (error) {
    byId("parameters").replaceChildren(el("p", { className: "error" }, visible(error.message)));
  }
  asksControls = false;
}

/** Chooses what is loaded, also while a starting server still loads, until the user chooses or runs. */
function chooseLoaded({ stats, precisions }) {
  const names = Object.keys(stats.precisions).filter((name) => stats.precisions[name].state === "loaded");
  if (names.join() !== precisions.join()) state.set({ precisions: names });
}

function listen() {
  if (byId("prompt").value) state.set({ prompt: byId("prompt").value }); // typed while the modules were loading
  setRunning(false);
  byId("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("prompt").addEventListener("input", () => state.set({ prompt: byId("prompt").value }));
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run();
  });
  byId("picker").addEventListener("change", () => (followsLoaded = false));
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("one-by-one").checked = state.get().oneByOne;
  byId("one-by-one").addEventListener("change", (event) => state.set({ oneByOne: event.target.checked }));
  window.addEventListener("pagehide", () => runner.stop());
}

/** The panel in its section, which is shown with it; the rest of the page works without. */
async function mountPanel(name) {
  const { mount } = await import(`./panels/${name}.js`);
  const section = byId(name);
  section.hidden = document.querySelector(`nav a[href="#${name}"]`).hidden = false;
  try {
    await mount(section, api, state);
  } catch (error) {
    section.append(el("p", { className: "error" }, visible(error.message)));
  }
}

async function mountPanels() {
  const mounted = await Promise.allSettled(PANELS.map(mountPanel));
  for (const { reason } of mounted) if (reason) console.error(reason);
  if (mounted.every(({ status: outcome }) => outcome === "rejected")) return;
  const style = new URL("panels.css", import.meta.url).href;
  document.head.append(el("link", { rel: "stylesheet", href: style }));
}

/** What the address says goes before what this tab keeps, whose precisions are those of its model. */
function readAddress() {
  const model = modelInAddress();
  if (model !== state.get().model) state.set({ model, precisions: [] });
  followsLoaded = !state.get().precisions.length;
}

async function start() {
  readAddress();
  listen();
  drawLegend();
  mountModels(byId("models"), state, chooseModel);
  mountMode(byId("mode"), state);
  mountSystem(state);
  mountPicker(byId("picker"), state);
  state.subscribe(update);
  update(state.get());
  await watch.start(() => runner.running || awaitsPrecisions);
  mountPanels();
}

start().catch(showConnection);
