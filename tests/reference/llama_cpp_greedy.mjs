// Greedy tokens of llama.cpp: node llama_cpp_greedy.mjs FOLDER FILE.gguf STEPS ID...
// FOLDER holds node_modules with node-llama-cpp (npm init -y && npm install node-llama-cpp).
// Prints the ids as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, file, steps, ...prompt] = process.argv.slice(2);
const require = createRequire(folder + "/");
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const llama = await getLlama({ gpu: false, maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 128, batchSize: 64, threads: 2, sequences: 1 });
const sequence = context.getSequence();
const ids = [];
for await (const token of sequence.evaluate(prompt.map(Number), { temperature: 0, yieldEogToken: true })) {
  ids.push(token);
  if (ids.length >= Number(steps)) break;
}
console.log(JSON.stringify(ids));
process.exit(0);
