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
