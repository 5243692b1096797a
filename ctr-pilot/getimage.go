package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/ctrlplane/pilot/processor"
)

// maxNamespaces bounds the namespaces that are searched for an image.
const maxNamespaces = 100

// getImage returns the image of that name. If there is none, the error says in which
// namespace or under which name it is instead.
func getImage(ctx context.Context, client *containerd.Client, name string) (images.Image, error) {
	store := client.ImageService()
	img, err := store.Get(ctx, name)
	if !errdefs.IsNotFound(err) {
		return img, err
	}
	own, _ := namespaces.Namespace(ctx)
	elsewhere, listErr := client.NamespaceService().List(ctx)
	if listErr != nil {
		return images.Image{}, err
	}
	elsewhere = slices.DeleteFunc(elsewhere, func(ns string) bool { return ns == own })
	for _, ns := range append([]string{own}, elsewhere[:min(len(elsewhere), maxNamespaces)]...) {
		for _, other := range spellings(name) {
			if ns == own && other == name {
				continue
			}
			if _, err := store.Get(namespaces.WithNamespace(ctx, ns), other); err != nil {
				continue
			}
			found := fmt.Sprintf("there is %s", other)
			if ns != own {
				found += fmt.Sprintf(" in namespace %s: choose that with \"ctr-pilot --namespace %s\"", ns, ns)
			}
			return images.Image{}, fmt.Errorf("%w in namespace %s; %s", err, own, found)
		}
	}
	return images.Image{}, fmt.Errorf("%w in namespace %s", err, own)
}

// spellings returns the names that other tools may have given an image: Docker, nerdctl
// and the kubelet use full names, and ctr does not.
func spellings(name string) []string {
	list := []string{name}
	if first, rest, ok := strings.Cut(name, "/"); !ok {
		list = append(list, "docker.io/library/"+name)
	} else if first == "library" {
		list = append(list, "docker.io/"+name)
	} else if !strings.ContainsAny(first, ".:") && first != "localhost" {
		list = append(list, "docker.io/"+name)
	} else if first == "docker.io" && !strings.Contains(rest, "/") {
		list = append(list, "docker.io/library/"+rest)
	}
	for _, n := range list {
		if !strings.Contains(n[strings.LastIndex(n, "/")+1:], ":") && !strings.Contains(n, "@") {
			list = append(list, n+":latest")
		}
	}
	return list
}

// withFetch adds to an error how to get the content that an image lacks: after a pull of CRI's
// that discarded layers, or found them unpacked already, pulling again fetches none.
func withFetch(ctx context.Context, err error, img images.Image) error {
	if !errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, processor.ErrNoKey) {
		return err
	}
	repository, _, _ := strings.Cut(img.Name, "@")
	if colon := strings.LastIndex(repository, ":"); colon > strings.LastIndex(repository, "/") {
		repository = repository[:colon]
	}
	if !strings.Contains(repository, "/") {
		return err
	}
	namespace, _ := namespaces.Namespace(ctx)
	return fmt.Errorf("%w; \"ctr-pilot --namespace %s content fetch --all-platforms %s@%s\" fetches what is missing from the registry",
		err, namespace, repository, img.Target.Digest)
}
