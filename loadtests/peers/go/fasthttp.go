// github.com/valyala/fasthttp.
package main

import (
	"log"

	"github.com/valyala/fasthttp"
)

func main() {
	listener := start()
	body := bodyMaker()
	server := &fasthttp.Server{
		IdleTimeout:           idleTimeout(),
		ReadTimeout:           idleTimeout(),
		DisableKeepalive:      *noKeepalive,
		NoDefaultDate:         true, // no other peer sends these two
		NoDefaultServerHeader: true,
		Handler: func(ctx *fasthttp.RequestCtx) {
			ctx.SetContentType("text/plain")
			if !*noKeepalive && !ctx.Request.ConnectionClose() {
				ctx.Response.Header.Set("Connection", "keep-alive")
			}
			ctx.SetBody(body())
		},
	}
	log.Fatal(server.Serve(listener))
}
