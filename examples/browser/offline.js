// A service worker that keeps what the page loads: the page opens again without a connection, and is newest with one.

self.addEventListener('install', () => self.skipWaiting())
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()))
self.addEventListener('fetch', (event) => {
  const isOwn = new URL(event.request.url).origin === self.location.origin
  if (isOwn && event.request.method === 'GET') event.respondWith(fetchOrRecall(event.request))
})

async function fetchOrRecall(request) {
  const cache = await caches.open('page')
  try {
    const response = await fetch(request)
    if (response.ok) await cache.put(request, response.clone())
    return response
  } catch (error) {
    return (await cache.match(request)) ?? Promise.reject(error)
  }
}
