// Print what transformers.js makes of an image for the model NAME of offline.mjs: node preprocess.mjs NAME IMAGE
import { AutoImageProcessor, RawImage } from '@huggingface/transformers';

const [name, image] = process.argv.slice(2);
const processor = await AutoImageProcessor.from_pretrained(name);
const { pixel_values } = await processor(await RawImage.read(image));
console.log(JSON.stringify({ dims: pixel_values.dims, data: Array.from(pixel_values.data) }));
