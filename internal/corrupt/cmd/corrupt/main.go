// Command corrupt damages a closed store, and prints what it did and what has
// to be found of it.
//
//	go run varve.dev/internal/corrupt/cmd/corrupt -list
//	go run varve.dev/internal/corrupt/cmd/corrupt -root DIR -kind 'bit flip' -seed 7
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"

	"varve.dev/internal/corrupt"
)

func main() {
	root := flag.String("root", "", "the store's directory; nothing may have it open")
	kind := flag.String("kind", "bit flip", "kind of damage")
	seed := flag.Uint64("seed", 1, "which damage of the kind")
	list := flag.Bool("list", false, "list the kinds")
	flag.Parse()
	if *list {
		for _, k := range corrupt.Kinds() {
			fmt.Printf("%-24s %s\n", k.Name, k.Does)
		}
		return
	}
	if err := run(*root, *kind, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "corrupt:", err)
		os.Exit(1)
	}
}

func run(root, kind string, seed uint64) error {
	if root == "" {
		return fmt.Errorf("-root has to name a store")
	}
	damage, err := corrupt.Do(root, kind, seed)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	return out.Encode(damage)
}
