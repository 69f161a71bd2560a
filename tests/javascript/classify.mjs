// Classify PNG files of a directory with the classifier that a module exports: node classify.mjs MODULE DIRECTORY RESAMPLE
// Prints what it returns, in the order of the files' names. RESAMPLE, if given, is the filter to resize with.
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [module, directory, resample] = process.argv.slice(2);
const { classifier } = await import(pathToFileURL(module));
if (resample) classifier.processor.resample = Number(resample);

const files = fs.readdirSync(directory).sort().map((name) => path.join(directory, name));
const found = [];
for (let i = 0; i < files.length; i += 50) {
  found.push(...(await classifier(files.slice(i, i + 50), { top_k: null })));
}
console.log(JSON.stringify(found));
