{{- /* Whether what the pods read of the namespace is there. Helm knows that it talks to a cluster by kube-root-ca.crt,
       which every namespace has. */}}
{{- define "shoal.checkNamespace" -}}
{{- if lookup "v1" "ConfigMap" .Release.Namespace "kube-root-ca.crt" -}}
{{- $random := "literal=%s=$(openssl rand -hex 24)" -}}
{{- with .Values -}}
{{- $secrets := list
  (dict "value" "auth.existingSecret" "name" .auth.existingSecret "entries" (list .auth.apiKeyEntry .auth.adminTokenEntry) "from" $random "else" ", or name those that it has by auth.apiKeyEntry and auth.adminTokenEntry")
  (dict "value" "ray.tokenSecret" "name" .ray.tokenSecret "entries" (list "auth_token") "from" $random)
  (dict "value" "ray.gcs.redisSecret" "name" .ray.gcs.redisSecret "entries" (list "password") "from" "file=%s")
  (dict "value" "tls.secret" "name" .tls.secret "entries" (list "tls.crt" "tls.key" "ca.crt") "from" "file=%s")
  (dict "value" "model.objectStore.secret" "name" .model.objectStore.secret "entries" list)
-}}
{{- $claims := list
  (dict "value" "model.pvc.claim" "name" .model.pvc.claim "can" "read")
  (dict "value" "outputs.claim" "name" .outputs.claim "can" "write")
-}}
{{- range $secrets }}{{ if .name }}{{ include "shoal.checkSecret" (merge . (dict "namespace" $.Release.Namespace)) }}{{ end }}{{ end -}}
{{- range $claims }}{{ if .name }}{{ include "shoal.checkClaim" (merge . (dict "namespace" $.Release.Namespace)) }}{{ end }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkSecret" -}}
{{- $secret := lookup "v1" "Secret" .namespace .name -}}
{{- if not $secret -}}
{{- $how := ternary "" " --from-env-file=FILE" (gt (len .entries) 0) -}}
{{- range .entries }}{{ $how = printf "%s --from-%s" $how (printf $.from .) }}{{ end -}}
{{- fail (printf "%s: there is no secret %s in namespace %s. Create it: kubectl --namespace %s create secret generic %s%s" .value .name .namespace .namespace .name $how) -}}
{{- end -}}
{{- range .entries -}}
{{- if not (get ($secret.data | default dict) .) -}}
{{- fail (printf "%s: the secret %s in namespace %s has no entry %s, or an empty one: add it%s" $.value $.name $.namespace . ($.else | default "")) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkClaim" -}}
{{- if not (lookup "v1" "PersistentVolumeClaim" .namespace .name) -}}
{{- fail (printf "%s: there is no claim %s in namespace %s: create it, such that all pods can %s" .value .name .namespace .can) -}}
{{- end -}}
{{- end -}}
