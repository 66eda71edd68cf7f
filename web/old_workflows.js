/**
 * Workflows of before there was Erasure Settings.
 *
 * Their Train Concept Erasure has the expert values among its own. Where any of them isn't as it
 * was left, they move to an Erasure Settings node that is wired to it; else they are dropped.
 * Nothing here imports the host, so that it can be read and tried on its own.
 */

export const TRAIN = "ConceptSurgeryTrain";
export const SETTINGS = "ConceptSurgerySettings";
const WIRE = "settings";

// What moved, with what it was left at, in the order of the old values.
export const EXPERT = {
  form: "auto",
  layers: "auto",
  templates: "",
  steps: -1,
  rank: -1,
  learning_rate: -1,
  eta: 0,
  protection: -1,
  drift_weight: 1,
  keep_weight: 1,
  null_score: "frozen",
  stop_below: -1,
  batch: -1,
  trajectories: -1,
  resolution: 0,
  captions: -1,
};
const NAMES = Object.keys(EXPERT);
const FORMS = ["auto", "hard", "soft"];
// Old values: seven that stayed in place, the model type, those above, what to do with a result.
const BEFORE = 8;
const OLD_LENGTH = BEFORE + NAMES.length + 1;

/**
 * The values of a saved node, taken apart if they are old.
 *
 * @param {unknown} values `widgets_values` as saved; newer ones may have more at the end.
 * @returns {{kept: unknown[], expert: Record<string, unknown>} | null} null if they are new.
 */
export function takenApart(values) {
  if (!Array.isArray(values) || values.length < OLD_LENGTH || !FORMS.includes(values[BEFORE])) {
    return null;
  }
  const end = BEFORE + NAMES.length;
  const given = values.slice(BEFORE, end);
  const expert = Object.fromEntries(NAMES.map((name, i) => [name, given[i]]));
  return { kept: [...values.slice(0, BEFORE), ...values.slice(end)], expert };
}

/** Those of the expert values that were changed. */
export function changed(expert) {
  const given = Object.entries(expert).filter(([name]) => name in EXPERT);
  return Object.fromEntries(given.filter(([name, value]) => value != null && value !== EXPERT[name]));
}

/**
 * A graph in API format, its expert values moved to nodes of their own.
 *
 * @param {Record<string, {class_type: string, inputs?: object}>} graph is left as it is.
 */
export function withSettingsNodes(graph) {
  if (!graph || typeof graph !== "object") return graph;
  const moved = { ...graph };
  let free = Math.max(0, ...Object.keys(graph).map(Number).filter(Number.isInteger)) + 1;
  for (const [id, node] of Object.entries(graph)) {
    if (node?.class_type !== TRAIN) continue;
    const old = Object.entries(node.inputs ?? {}).filter(([name]) => name in EXPERT);
    if (!old.length) continue;
    const inputs = Object.fromEntries(
      Object.entries(node.inputs).filter(([name]) => !(name in EXPERT)),
    );
    const values = changed(Object.fromEntries(old));
    if (Object.keys(values).length && !(WIRE in inputs)) {
      const own = String(free++);
      moved[own] = { class_type: SETTINGS, inputs: values };
      inputs[WIRE] = [own, 0];
    } else if (Object.keys(values).length) {
      continue; // both: the host says what to do
    }
    moved[id] = { ...node, inputs };
  }
  return moved;
}

/** Nodes that were loaded with old values, until {@link putSettings} sees to them. */
const waiting = new Map();

/**
 * Have a node type read old values, too.
 *
 * @param {Function} nodeType the front end's class of Train Concept Erasure.
 */
export function readsOldValues(nodeType) {
  const configure = nodeType.prototype.configure;
  nodeType.prototype.configure = function (saved, ...rest) {
    const old = takenApart(saved?.widgets_values);
    if (!old) return configure.call(this, saved, ...rest);
    waiting.set(this, changed(old.expert));
    setTimeout(putSettings); // for what is pasted; after a workflow it was done before
    return configure.call(this, { ...saved, widgets_values: old.kept }, ...rest);
  };
}

/** Put an Erasure Settings node beside each node that had expert values. */
export function putSettings() {
  for (const [node, values] of [...waiting]) {
    waiting.delete(node);
    if (node.graph) settle(node, values);
  }
}

function settle(node, values) {
  const linked = oldLinks(node);
  if (!Object.keys(values).length && !linked.length) return;
  const settings = window.LiteGraph.createNode(SETTINGS);
  node.graph.add(settings);
  settings.pos = freePlace(node, settings);
  for (const widget of settings.widgets ?? []) {
    if (!(widget.name in values)) continue;
    widget.value = values[widget.name];
    widget.callback?.(widget.value);
  }
  for (const { name, origin, slot } of linked) {
    const input = settings.inputs.findIndex((one) => one.name === name);
    if (input >= 0) origin.connect(slot, settings, input);
  }
  settings.connect(0, node, node.inputs.findIndex((one) => one.name === WIRE));
}

/** Links that ended at an expert value, whose inputs are taken off the node. */
function oldLinks(node) {
  const found = [];
  for (let i = (node.inputs ?? []).length - 1; i >= 0; i--) {
    const { name, link } = node.inputs[i];
    if (!(name in EXPERT)) continue;
    const from = link == null ? null : (node.graph.getLink?.(link) ?? node.graph.links[link]);
    const origin = from && node.graph.getNodeById(from.origin_id);
    if (origin) found.push({ name, origin, slot: from.origin_slot });
    node.removeInput(i);
  }
  return found;
}

/** A place to the left of a node where nothing lies. */
function freePlace(node, settings) {
  const [width, height] = settings.size;
  const gap = 160; // the newer renderer draws nodes larger
  const x = node.pos[0] - width - gap;
  let y = node.pos[1];
  const others = (node.graph.nodes ?? node.graph._nodes).filter((one) => one !== settings);
  const overlaps = (one) =>
    one.pos[0] < x + width + gap / 2 &&
    x < one.pos[0] + one.size[0] + gap / 2 &&
    one.pos[1] - gap < y + height &&
    y - gap < one.pos[1] + one.size[1];
  for (let hit = others.find(overlaps); hit; hit = others.find(overlaps)) {
    y = hit.pos[1] + hit.size[1] + gap + 1;
  }
  return [x, y];
}
