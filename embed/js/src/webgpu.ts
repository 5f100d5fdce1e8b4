/** onnxruntime on WebGPU: a device on which its attention gives the right numbers. */
import type { InferenceSession } from "onnxruntime-common";

type SessionOptions = InferenceSession.SessionOptions;

// onnxruntime 1.30's attention has branches for subgroups of 8 and more; in ones of 4 the picture
// is another (tests/test_webgpu.py).
const NARROWEST = 8;
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
  "maxComputeWorkgroupSizeZ",
] as const;

/** One device for all sessions of a page, by the `navigator.gpu` that it comes from. */
const devices = new WeakMap<GPU, Promise<GPUDevice | undefined>>();

/**
 * The options of a session; where its provider is WebGPU without a device of the app's own, and
 * the adapter's subgroups can be narrow, with a device that has none.
 */
export async function withDevice(
  options: SessionOptions,
  gpu: GPU | undefined = globalThis.navigator?.gpu,
): Promise<SessionOptions> {
  if (!gpu || !options.executionProviders) return options;
  const executionProviders: InferenceSession.ExecutionProviderConfig[] = [];
  for (const provider of options.executionProviders) {
    const asked = typeof provider === "string" ? { name: provider } : provider;
    const device = asked.name === "webgpu" && !("device" in asked) ? await narrow(gpu) : undefined;
    executionProviders.push(device ? { ...asked, name: "webgpu", device } : provider);
  }
  return { ...options, executionProviders };
}

/** A device without subgroups where they can be narrow; otherwise onnxruntime chooses better. */
function narrow(gpu: GPU): Promise<GPUDevice | undefined> {
  let device = devices.get(gpu);
  if (!device) {
    device = make(gpu, () => devices.delete(gpu));
    devices.set(gpu, device);
    device.catch(() => devices.delete(gpu));
  }
  return device;
}

async function make(gpu: GPU, lost: () => void): Promise<GPUDevice | undefined> {
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter?.features.has("subgroups")) return undefined;
  if ((adapter.info.subgroupMinSize ?? 0) >= NARROWEST) return undefined; // 0: it is not said
  const device = await adapter.requestDevice({
    requiredFeatures: adapter.features.has("shader-f16") ? ["shader-f16"] : [],
    requiredLimits: Object.fromEntries(LIMITS.map((name) => [name, adapter.limits[name]])),
  });
  void device.lost.then(lost);
  return device;
}
