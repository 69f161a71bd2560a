// Loaded before a script (node --import): transformers.js takes models from the directory MODELS, and nothing else.
import { env } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.localModelPath = process.env.MODELS;
