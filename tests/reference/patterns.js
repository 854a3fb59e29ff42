// What JavaScript's regular expressions (with the flag u, as ajv uses them) match: writes tests/data/ecma_patterns.json.
//   node tests/reference/patterns.js > tests/data/ecma_patterns.json
const texts = ["", "a", "b", "A", "ab", "axx", "foo", "é", "K", "5", "٣", "_", " ", "\u00a0", "\ufeff", "\u0085", "\u2028",
  "\n", "\r", "\t", "a\n", "😀", "😀😀", "[", "]", "&", "-", "^", ".", "<", "/", "\\", "xx", "aa", "ß", "日本"];
const patterns = ["^a$", "^a|b$", "a", "^.$", "^..$", "^[^a]$", "^[^]$", "^\\d$", "^\\D$", "^\\w$", "^\\W$", "^\\s$", "^\\S$",
  "^[\\s]$", "^[^\\s]$", "^[\\s\\S]$", "^[\\d_]$", "^[\\D]$", "^[\\w.-]+$", "^\\/$", "^\\.$", "^\\u0041$", "^[\\u0041-\\u0043]$",
  "^\\x41$", "^\\ud83d\\ude00$", "^\\u{1F600}$", "^\\p{L}$", "^\\p{Lu}$", "^\\P{L}$", "^[\\p{L}]$", "^$", "a{0,2}", "^(?:a|b)+$", "^(?<n>a)$",
  "^[[]$", "^[&]$", "^[a&&b]$", "^[~~a]$", "^[\\-a]$", "^[a-]$", "^[.]$", "^[$^]$", "^x{2}$", "^\\t$", "^\\cJ$", "^\\n$",
  "^a\\n$", "^[\\b]$", "^\\[$", "^\\\\$", "^(a|é)?$", "\\A", "\\z", "\\a", "(?i)a", "(?P<n>a)", "[]a]", "^é$", "^日本$"];
const table = {};
for (const pattern of patterns) {
  let found;
  try { found = new RegExp(pattern, "u"); } catch { table[pattern] = null; continue; }
  table[pattern] = Object.fromEntries(texts.map((text) => [text, found.test(text)]));
}
console.log(JSON.stringify(table));
