/**
 * Words that the nodes are found by, for hosts and front ends that know no search words.
 *
 * The same as SEARCH_WORDS in nodes/words.py, which newer hosts send.
 */

export const SEARCH_WORDS = {
  ConceptSurgeryTrain: [
    "erase",
    "remove",
    "forget",
    "delete",
    "unlearn",
    "censor",
    "LECO",
    "ESD",
    "UCE",
    "erase concept",
    "remove concept",
  ],
  ConceptSurgerySettings: ["expert settings", "training steps", "rank", "learning rate"],
  ConceptSurgerySuggest: ["synonyms", "other names", "neighbours", "similar words"],
  ConceptSurgeryApply: ["apply erasure", "erased model", "patch model", "strength"],
  ConceptSurgeryReport: ["verdict", "what changes", "erasure statistics"],
  ConceptSurgeryPurify: ["clean image", "remove from picture", "inversion", "img2img"],
  ConceptSurgeryCompare: ["before after", "compare", "grid", "xy plot", "test erasure"],
  ConceptSurgeryJoin: ["merge erasures", "combine erasures", "stack", "several concepts"],
  ConceptSurgeryTakeOut: ["restore concept", "undo erasure", "split erasure"],
  ConceptSurgerySave: ["save LoRA", "export erasure"],
  ConceptSurgeryLoad: ["load LoRA", "open erasure"],
};

/**
 * Give the definition of a node its search words, as a host sends them that knows of them.
 *
 * @param {object} definition as in /object_info.
 */
export function giveWords(definition) {
  const words = SEARCH_WORDS[definition?.name];
  if (words && !definition.search_aliases?.length) definition.search_aliases = [...words];
}

const LEAST = 3; // letters from which on the beginning of a search word counts

/**
 * Have the search find the nodes by their words, too.
 *
 * Front end 1.32 searches in names alone. 1.49 and 1.58 look through the words, but put what only
 * sounds like one in front ("leco" finds VAE Decode). One whose search is another than is known here
 * is left as it is.
 *
 * @param {object} app the front end.
 * @returns {boolean} whether the search was extended.
 */
export function searchByWords(app) {
  const service = app?.extensionManager?._p?._s?.get?.("nodeDef")?.nodeSearchService;
  const search = service?.searchNode;
  if (typeof search !== "function") return false;
  const kind = Object.getPrototypeOf(service); // each new list of nodes has a service of its own
  kind.searchNode = function (typed, filters = [], options = undefined, ...rest) {
    const byName = search.call(this, typed, filters, undefined, ...rest);
    const fitting = () => search.call(this, "", filters, undefined, ...rest); // all nodes
    const found = withWords(typed, byName, fitting);
    return options?.limit ? found.slice(0, options.limit) : found;
  };
  return true;
}

/**
 * What is found by name, and by the words: first who is called just so, then those with just that
 * word, at last those with a word that begins so.
 */
function withWords(typed, byName, fitting) {
  const asked = typeof typed === "string" ? typed.trim().toLowerCase() : "";
  if (asked.length < LEAST) return byName;
  const has = (matches) => (node) => SEARCH_WORDS[node.name]?.some((w) => matches(w.toLowerCase()));
  const begun = fitting().filter(has((word) => word.startsWith(asked)));
  if (!begun.length) return byName;
  const called = byName.filter((node) => node.display_name?.toLowerCase() === asked);
  const exact = begun.filter(has((word) => word === asked));
  return [...new Set([...called, ...exact, ...byName, ...begun])];
}
