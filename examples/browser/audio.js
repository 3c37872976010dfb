// A file or the microphone -> one channel at the model's sampling rate.

import { OPUS_RATE, readHeader } from './header.js'
import { resample } from './resample.js'

export const FORMATS = 'wav, flac, mp3, ogg, opus, m4a and webm'
const MAX_MEGABYTES = 200
const MAX_RECORDING_SECONDS = 300
// of files whose header does not tell
const DEFAULT_RATE = 48000
// a sharp filter for Opus, whose own band ends there
const OPUS_FILTER = [0.975, 80]

/** The mean of a file's channels at `rate` Hz, in [-1, 1]. Throws an Error whose message is for the user. */
export async function readSound(file, rate) {
  if (file.size === 0) throw new Error(`${file.name} is empty.`)
  if (file.size > MAX_MEGABYTES * 1e6) {
    throw new Error(`${file.name} has ${Math.round(file.size / 1e6)} MB, this page takes up to ${MAX_MEGABYTES} MB.`)
  }
  const bytes = await file.arrayBuffer()
  const header = readHeader(bytes)
  let audio
  try {
    audio = await decodingContext(header.isOpus ? OPUS_RATE : header.rate).decodeAudioData(bytes)
  } catch {
    throw new Error(
      `${file.name} cannot be read. This browser takes ${FORMATS}; the file may be of another kind, damaged, or too long.`,
    )
  }
  let [samples, ownRate] = [mixDown(audio), audio.sampleRate]
  if (header.isOpus) {
    // as libsndfile decodes it, without the faint traces above the frequencies that the file holds
    samples = await resample(samples, ownRate, header.rate, ...OPUS_FILTER)
    ownRate = header.rate
  }
  samples = await resample(samples, ownRate, rate)
  if (samples.length === 0) throw new Error(`${file.name} holds no samples.`)
  if (!samples.every(Number.isFinite)) throw new Error(`${file.name} holds samples that are not finite numbers.`)
  return samples
}

/** `decodeAudioData` resamples to the rate of its context, by a filter that alters the upper half: it is best the file's. */
function decodingContext(rate) {
  try {
    return new OfflineAudioContext(1, 1, rate ?? DEFAULT_RATE)
  } catch {
    return new OfflineAudioContext(1, 1, DEFAULT_RATE) // browsers differ in the rates that they take
  }
}

function mixDown(audio) {
  const mean = audio.getChannelData(0).slice()
  for (let channel = 1; channel < audio.numberOfChannels; channel++) {
    const samples = audio.getChannelData(channel)
    for (let index = 0; index < mean.length; index++) mean[index] += samples[index]
  }
  return audio.numberOfChannels === 1 ? mean : mean.map((sum) => sum / audio.numberOfChannels)
}

/**
 * Starts to record: `{ finished, stop }`, of which `finished` resolves to a wav file after `stop()` or five minutes.
 * `onLevel(seconds, peak)` is called about ten times a second. Throws an Error whose message is for the user.
 */
export async function startRecording(onLevel) {
  if (!navigator.mediaDevices) throw new Error('Browsers record only on pages from https:// or from this computer.')
  let stream
  try {
    // without the changes that are made for calls
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false }
    stream = await navigator.mediaDevices.getUserMedia({ audio })
  } catch (error) {
    const missing = error.name === 'NotFoundError'
    throw new Error(missing ? 'No microphone was found.' : `The microphone may not be used (${error.message}).`)
  }
  const context = new AudioContext()
  const close = () => {
    stream.getTracks().forEach((track) => track.stop())
    return context.close()
  }
  try {
    await context.audioWorklet.addModule('microphone.js')
  } catch (error) {
    await close()
    throw new Error(`Recording could not start (${error.message}).`)
  }
  const microphone = new AudioWorkletNode(context, 'microphone', { numberOfOutputs: 0 })
  const chunks = []
  let [length, peak, reported] = [0, 0, 0]
  let stop
  const stopped = new Promise((resolve) => (stop = resolve))
  microphone.port.onmessage = ({ data }) => {
    chunks.push(data)
    length += data.length
    peak = Math.max(peak, ...data.map(Math.abs))
    if (length - reported < context.sampleRate / 10) return
    onLevel(length / context.sampleRate, peak)
    ;[peak, reported] = [0, length]
    if (length >= MAX_RECORDING_SECONDS * context.sampleRate) stop()
  }
  context.createMediaStreamSource(stream).connect(microphone)
  const finished = stopped.then(async () => {
    await close()
    if (length === 0) throw new Error('Nothing was recorded.')
    return new File([wavHeader(length, context.sampleRate), ...chunks], 'recording.wav', { type: 'audio/wav' })
  })
  return { finished, stop }
}

/** The header of a wav file of one channel of float32 samples. */
function wavHeader(samples, rate) {
  const header = new DataView(new ArrayBuffer(44))
  const bytes = 4 * samples
  const write = (at, text) => [...text].forEach((letter, index) => header.setUint8(at + index, letter.charCodeAt(0)))
  write(0, 'RIFF')
  header.setUint32(4, 36 + bytes, true)
  write(8, 'WAVEfmt ')
  header.setUint32(16, 16, true)
  header.setUint16(20, 3, true) // floating point
  header.setUint16(22, 1, true)
  header.setUint32(24, rate, true)
  header.setUint32(28, 4 * rate, true)
  header.setUint16(32, 4, true)
  header.setUint16(34, 32, true)
  write(36, 'data')
  header.setUint32(40, bytes, true)
  return header
}
