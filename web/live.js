/** Shows at the nodes that train how far they are, and lets a person stop and keep. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { LiveView } from "./live_view.js";

const NODES = new Set(["ConceptSurgeryTrain", "ConceptSurgeryJoin"]);
const EVENT = "concept_surgery.run";
const WIDGET = "concept_surgery_run";
const UNSEEN = /\u2060/g; // what the server puts into texts so that nothing is read as markup
const views = new WeakMap(); // of nodes
const LEAST_HEIGHT = 16;
const MARGIN = 20; // above and below together, which the canvas takes of a widget's height
let rebuilt = false; // once the connection was there

/** The node that the server calls by an id like "3" or, in subgraphs, "12:3". */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node && NODES.has(node.comfyClass ?? node.type) ? node : null;
}

function show(run) {
  const node = nodeOf(run?.node);
  const view = node && views.get(node);
  if (!view) return;
  view.run = { ...view.run, ...run };
  view.show(run);
  requestAnimationFrame(() => fit(node, view));
}

/** Pixels of the widget with its margin. */
function heightOf(view) {
  return view.empty ? LEAST_HEIGHT : view.height() + MARGIN;
}

/** Make room for what is shown; a node that a person made larger stays so. */
function fit(node, view) {
  const height = heightOf(view);
  if (Math.abs(height - (view.given ?? 0)) < 4) return;
  const more = height - (view.given ?? 0);
  view.given = height;
  const [width, now] = node.size;
  const least = node.computeSize?.()[1] ?? now;
  node.setSize?.([width, Math.max(least, more > 0 ? now : now + more)]);
  node.setDirtyCanvas?.(true, true);
}

async function stop(view) {
  if (!view.run?.node) return;
  view.button.disabled = true;
  view.button.textContent = "Stopping…";
  const which = { client_id: api.clientId, node: view.run.node };
  if (view.run.prompt_id) which.prompt_id = view.run.prompt_id;
  const answer = await api.fetchApi("/concept_surgery/stop", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(which),
  });
  if (!answer.ok) view.button.disabled = false;
}

/** Whether a run that the server remembers is of what stands in this node now. */
function isOf(run, node) {
  const typed = node.widgets?.find((widget) => widget.name === "erase")?.value;
  const input = node.inputs?.find((one) => one.name === "erase");
  if (typeof typed !== "string" || input?.link != null) return true;
  const first = String(run.erases ?? "").replace(UNSEEN, "").split("\n")[0];
  return typed.replace(UNSEEN, "").includes(first);
}

/** After a page was loaded again: what the server remembers of its runs. */
async function rebuild() {
  if (!api.clientId) return;
  const which = new URLSearchParams({ client_id: api.clientId });
  const answer = await api.fetchApi(`/concept_surgery/runs?${which}`);
  if (!answer.ok) return;
  for (const run of (await answer.json()).runs ?? []) {
    const node = nodeOf(run?.node);
    if (node && isOf(run, node)) show(run);
  }
}

app.registerExtension({
  name: "ConceptSurgery.Live",

  nodeCreated(node) {
    if (!NODES.has(node.comfyClass) || typeof node.addDOMWidget !== "function") return;
    const view = new LiveView(() => stop(view));
    const widget = node.addDOMWidget(WIDGET, "CONCEPT_SURGERY_RUN", view.element, {
      serialize: false,
      hideOnZoom: true,
      getMinHeight: () => heightOf(view),
      getMaxHeight: () => heightOf(view),
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false; // or old workflows would find another number of values
    views.set(node, view);
  },

  afterConfigureGraph() {
    rebuild().catch((error) => console.warn("Concept Surgery:", error));
  },

  setup() {
    api.addEventListener(EVENT, (event) => show(event.detail));
    // What the host has in its cache comes with its outputs, and no events.
    api.addEventListener("executed", (event) => {
      const run = event.detail?.output?.concept_surgery?.[0];
      if (run) show({ ...run, node: event.detail.node });
    });
    // The connection may be there only after the graph.
    api.addEventListener("status", () => {
      if (rebuilt || !api.clientId) return;
      rebuilt = true;
      rebuild().catch((error) => console.warn("Concept Surgery:", error));
    });
  },
});
