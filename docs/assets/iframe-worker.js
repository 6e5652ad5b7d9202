// Browsers start no worker from a disk. There, the search runs in a hidden frame of the page instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      inside.importScripts = (...urls) => urls.reduce((before, each) => before.then(() =>
        new Promise((done, failed) => {
          const script = inside.document.createElement("script")
          script.src = new URL(each, url).href
          script.onload = done
          script.onerror = failed
          inside.document.body.appendChild(script)
        })), Promise.resolve())
      inside.postMessage = data => setTimeout(() => {
        const passed = new MessageEvent("message", { data })
        this.dispatchEvent(passed)
        this.onmessage?.(passed)
      })
      const script = inside.document.createElement("script")
      script.src = url
      script.onload = () => {
        this.waiting.forEach(data => this.deliver(data))
        this.waiting = null
      }
      inside.document.body.appendChild(script)
    }

    deliver(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }

    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.deliver(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
