// Runs in the browser's audio thread: sends the mean of the microphone's channels to audio.js.

registerProcessor(
  'microphone',
  class extends AudioWorkletProcessor {
    process([channels]) {
      if (channels.length > 0) {
        const mean = channels[0].map((_, index) => channels.reduce((sum, samples) => sum + samples[index], 0))
        this.port.postMessage(mean.map((sum) => sum / channels.length))
      }
      return true
    }
  },
)
