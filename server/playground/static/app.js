// Starts the page: the state, the API, and every part in its place.

import { Api } from "./api.js";
import { createState } from "./state.js";
import * as precisions from "./panels/precisions.js";
import * as report from "./panels/report.js";
import * as snippets from "./panels/snippets.js";

const byId = (id) => document.getElementById(id);
const state = createState();
const api = new Api();

precisions.mount(byId("precisions"), api, state);
report.mount(byId("report"), api, state);
snippets.mount(byId("snippets"), api, state);
