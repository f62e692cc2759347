{{- /* Of a job of the values: its name with a hash, so that a changed job is another one. */}}
{{- define "shoal.jobName" -}}
{{ .name }}-{{ omit . "name" | toJson | sha256sum | trunc 8 }}
{{- end -}}

{{- /* File name of its recipe. */}}
{{- define "shoal.recipe" -}}
{{ include "shoal.jobName" . }}.yaml
{{- end -}}

{{- /* Its command. A config map reaches pods that run already within a minute or two: wait for it. */}}
{{- define "shoal.entrypoint" -}}
{{- $file := .file | default (printf "/etc/shoal/recipes/%s" (include "shoal.recipe" .)) -}}
{{- $train := include "shoal.train" (dict "file" $file "args" .args) -}}
{{- ternary $train (printf "bash -c \"until [ -e %s ]; do sleep 1; done; exec %s\"" $file $train) (empty .recipe) -}}
{{- end -}}
